// Dropout by a mask that is computed, never kept, as in src/dropout.rs, bit for bit. Forward and backward are the same product.
//
// Element number n takes word n % 4 of Philox's block n / 4: a thread draws what its elements need, wherever they begin.
#include "numbers.cuh"

// As src/dropout.rs declares it.
struct Mask {
    // Element e has the number first + e / run * (run + gap) + e % run.
    u64 first;
    u64 run;
    u64 gap;
    u32 key[2];
    u32 name[2];
    // A word below it drops its element.
    u32 threshold;
    float scale;

    __device__ __forceinline__ u64 number(u64 e) const {
        if (e < run) return first + e;
        // Division takes several times as long in 64 bits.
        const bool is_small = (e | run) >> 32 == 0;
        const u64 row = is_small ? u32(e) / u32(run) : e / run;
        return first + row * (run + gap) + (e - row * run);
    }
};

template <class T>
struct Dropout {
    const T* x;
    // May be x.
    T* out;
    u64 numel;
    Mask mask;
};

template <class T>
__device__ __forceinline__ void dropout(const Dropout<T>& p) {
    constexpr int V = VECTOR<T>;
    // Where runs follow each other without a gap, or no vector reaches beyond its run, numbers of a vector follow each other.
    const bool vectors = aligned<V>(p.x) && aligned<V>(p.out) && (p.mask.gap == 0 || p.mask.run % V == 0);
    for_each_in_grid<V>(p.numel, vectors, [&](auto lanes, u64 at) {
        constexpr int N = decltype(lanes)::COUNT;
        // Of N elements, the first of which may have any word of its block.
        constexpr int BLOCKS = (N + 6) / 4;
        float x[N];
        load(p.x + at, x);
        const u64 number = p.mask.number(at);
        const u32 skip = u32(number) % 4;
        u32 words[4 * BLOCKS];
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            Philox drawn = {};
            if (4 * b < N || skip != 0) drawn = philox(number / 4 + b, p.mask.name, p.mask.key);
            UNROLL
            for (int w = 0; w < 4; w++) words[4 * b + w] = drawn.words[w];
        }
        UNROLL
        for (int k = 0; k < N; k++) {
            // words[k + skip], without an address: registers have none.
            const u32 low = skip & 1 ? words[k + 1] : words[k], high = skip & 1 ? words[k + 3] : words[k + 2];
            const u32 word = skip & 2 ? high : low;
            x[k] *= word >= p.mask.threshold ? p.mask.scale : 0.0f;
        }
        store(p.out + at, x);
    });
}

KERNEL(dropout_f32, Dropout<float>) { dropout(p); }
KERNEL(dropout_bf16, Dropout<bf16>) { dropout(p); }
KERNEL(dropout_f16, Dropout<f16>) { dropout(p); }
