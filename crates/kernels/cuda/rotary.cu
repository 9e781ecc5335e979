// Rotary position embedding, as in src/rotary.rs. A block takes all heads of one position; a thread, both sides of some planes.
#include "numbers.cuh"

template <class T>
struct Rotate {
    const T* x;
    T* out;
    const float* cos;
    const float* sin;
    // Sequences times positions.
    u64 rows;
    u64 seq;
    u32 heads;
    u32 half;
    // Of the sines: 1, or -1 to turn back.
    float sign;
};

// Some of one vector's worth of angles.
template <class T, int N>
struct Angles {
    static __device__ __forceinline__ void load_from(const float* from, float (&x)[N]) {
        constexpr int PART = N < VECTOR<float> ? N : VECTOR<float>;
        UNROLL
        for (int start = 0; start < N; start += PART) {
            float part[PART];
            load(from + start, part);
            UNROLL
            for (int k = 0; k < PART; k++) x[start + k] = part[k];
        }
    }
};

template <class T>
__device__ __forceinline__ void rotate(const Rotate<T>& p) {
    constexpr int V = VECTOR<T>;
    const bool vectors = p.half % V == 0 && aligned<V>(p.x) && aligned<V>(p.out) && aligned<VECTOR<float>>(p.cos) &&
                         aligned<VECTOR<float>>(p.sin);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const u64 angles = row % p.seq * p.half, start = row * p.heads * p.half * 2;
        for_each_in_block<V>(u64(p.heads) * p.half, vectors, [&](auto lanes, u64 plane) {
            constexpr int N = decltype(lanes)::COUNT;
            const u32 head = u32(plane) / p.half, i = u32(plane) % p.half;
            const u64 at = start + u64(head) * p.half * 2 + i;
            float cos[N], sin[N], low[N], high[N];
            Angles<T, N>::load_from(p.cos + angles + i, cos);
            Angles<T, N>::load_from(p.sin + angles + i, sin);
            load(p.x + at, low);
            load(p.x + at + p.half, high);
            UNROLL
            for (int k = 0; k < N; k++) {
                const float s = sin[k] * p.sign, of_low = low[k] * s, of_high = high[k] * -s;
                low[k] = fmaf(low[k], cos[k], of_high);
                high[k] = fmaf(high[k], cos[k], of_low);
            }
            store(p.out + at, low);
            store(p.out + at + p.half, high);
        });
    }
}

KERNEL(rotate_f32, Rotate<float>) { rotate(p); }
KERNEL(rotate_bf16, Rotate<bf16>) { rotate(p); }
KERNEL(rotate_f16, Rotate<f16>) { rotate(p); }
