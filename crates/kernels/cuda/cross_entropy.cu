// Cross-entropy of a softmax and the gradient of its logits, in place if asked, as in src/cross_entropy.rs. A block takes a row.
//
//     read a row once: maximum and sum of exponentials together       read it again: write the gradient
//
// The sum is kept relative to the largest element so far and scaled down when a larger one comes, which rounds
// differently from the CPU's two passes.
#include "numbers.cuh"
#include "reduce.cuh"

template <class T>
struct CrossEntropy {
    const T* logits;
    // Where gradients go: nowhere, over the logits, or elsewhere.
    T* grad;
    const i64* targets;
    double* losses;
    // The first row whose target is no class: the smallest of what stands there and those found.
    u64* bad_row;
    u64 rows;
    u64 classes;
    float scale;
};

__device__ __forceinline__ float infinite() {
    return __uint_as_float(0x7f800000);
}

// The sum of exp(x - max) over some elements, and their maximum, which passes NaN over: NaN shows in the sum.
struct Softmax {
    float max;
    float sum;

    __device__ __forceinline__ Softmax from_lane(int lane) const {
        return Softmax{__shfl_sync(ALL_LANES, max, lane), __shfl_sync(ALL_LANES, sum, lane)};
    }

    // The same sum relative to a maximum that is no smaller. Of minus infinity only, there is nothing to scale.
    __device__ __forceinline__ float relative_to(float larger_max) const {
        return max == larger_max ? sum : sum * exponential(max - larger_max);
    }

    __device__ __forceinline__ Softmax with(Softmax other) const {
        const float both = larger(max, other.max);
        return Softmax{both, relative_to(both) + other.relative_to(both)};
    }

    template <int N>
    __device__ __forceinline__ void add(const float (&x)[N]) {
        float new_max = max;
        UNROLL
        for (int k = 0; k < N; k++) new_max = larger(x[k], new_max);
        sum = relative_to(new_max);
        max = new_max;
        UNROLL
        for (int k = 0; k < N; k++) sum += x[k] == -infinite() ? 0.0f : exponential(x[k] - max);
    }
};

template <class T>
__device__ __forceinline__ void cross_entropy(const CrossEntropy<T>& p) {
    SHARED(Softmax, scratch, [WARP]);
    constexpr int V = VECTOR<T>;
    const Softmax nothing = {-infinite(), 0.0f};
    const bool vectors = p.classes % V == 0 && aligned<V>(p.logits) && aligned<V>(p.grad);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* logits = p.logits + row * p.classes;
        const i64 target = p.targets[row];
        if (target < 0 || u64(target) >= p.classes) {
            if (threadIdx.x == 0) {
                atomicMin(p.bad_row, row);
                p.losses[row] = __longlong_as_double(0x7ff8000000000000ll);
            }
            continue;
        }
        // Read before anyone writes: between stands the reduction.
        const float of_target = widen(logits[target]);
        Softmax softmax = nothing;
        for_each_in_block<V>(p.classes, vectors, [&](auto lanes, u64 at) {
            float x[decltype(lanes)::COUNT];
            load(logits + at, x);
            softmax.add(x);
        });
        softmax = block_reduce(softmax, nothing, scratch, [](Softmax a, Softmax b) { return a.with(b); });
        // Minus infinity only: no probabilities.
        const double sum = softmax.max == -infinite() ? __longlong_as_double(0x7ff8000000000000ll) : double(softmax.sum);
        if (threadIdx.x == 0) {
            const double ln_sum = sum != sum ? sum : logarithm(sum);
            p.losses[row] = ln_sum + (double(softmax.max) - double(of_target));
        }
        if (p.grad == nullptr) continue;
        T* grad = p.grad + row * p.classes;
        const float inverse = float(double(p.scale) / sum);
        for_each_in_block<V>(p.classes, vectors, [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x[N];
            load(logits + at, x);
            UNROLL
            for (int k = 0; k < N; k++) {
                const float e = exponential(x[k] - softmax.max);
                x[k] = at + k == u64(target) ? fmaf(e, inverse, -p.scale) : e * inverse;
            }
            store(grad + at, x);
        });
    }
}

KERNEL(cross_entropy_f32, CrossEntropy<float>) { cross_entropy(p); }
KERNEL(cross_entropy_bf16, CrossEntropy<bf16>) { cross_entropy(p); }
KERNEL(cross_entropy_f16, CrossEntropy<f16>) { cross_entropy(p); }
