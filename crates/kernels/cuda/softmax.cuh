// What a row's probabilities are made of, in one pass: the sum is kept relative to the largest element so far.
#pragma once
#include "numbers.cuh"
#include "reduce.cuh"

__device__ __forceinline__ float infinite() {
    return __uint_as_float(0x7f800000);
}

__device__ __forceinline__ double not_a_number() {
    return __longlong_as_double(0x7ff8000000000000ll);
}

// Calls `each` for all elements of a row, which a block's threads load V at a time where `vectors` says so, two loads under way.
template <int V, class T, class Each>
__device__ __forceinline__ void for_each_of_row(const T* row, u64 numel, bool vectors, Each each) {
    const u64 whole = vectors ? numel / V : 0;
    u64 i = threadIdx.x;
    for (; i + blockDim.x < whole; i += 2 * blockDim.x) {
        float first[V], second[V];
        load(row + i * V, first);
        load(row + (i + blockDim.x) * V, second);
        each(first, i * V);
        each(second, (i + blockDim.x) * V);
    }
    if (i < whole) {
        float last[V];
        load(row + i * V, last);
        each(last, i * V);
    }
    for (u64 at = whole * V + threadIdx.x; at < numel; at += blockDim.x) {
        float one[1];
        load(row + at, one);
        each(one, at);
    }
}

// Of a row with this maximum, sum of exponentials and logit of the target.
__device__ __forceinline__ double loss_of(float max, double sum, float of_target) {
    const double ln_sum = sum != sum ? sum : logarithm(sum);
    return ln_sum + (double(max) - double(of_target));
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
        return max == larger_max ? sum : sum * fast_exponential(max - larger_max);
    }

    __device__ __forceinline__ Softmax with(Softmax other) const {
        const float both = larger(max, other.max);
        return Softmax{both, relative_to(both) + other.relative_to(both)};
    }

    template <int N>
    __device__ __forceinline__ void add(const float (&x)[N]) {
        float new_max = max;
        UNROLL
        for (int k = 0; k < N; k++) new_max = larger_number(x[k], new_max);
        sum = relative_to(new_max);
        max = new_max;
        // Minus infinity, which all elements so far may be, is not to be subtracted from itself.
        const float base = max == -infinite() ? 0.0f : max;
        UNROLL
        for (int k = 0; k < N; k++) sum += fast_exponential(x[k] - base);
    }
};

// A row of the block's, all of whose threads call. `scratch` as in block_reduce.
template <int V, class T>
__device__ __forceinline__ Softmax softmax_of_row(const T* row, u64 numel, bool vectors, Softmax (&scratch)[WARP]) {
    const Softmax nothing = {-infinite(), 0.0f};
    Softmax softmax = nothing;
    for_each_of_row<V>(row, numel, vectors, [&](auto& x, u64) { softmax.add(x); });
    return block_reduce(softmax, nothing, scratch, [](Softmax a, Softmax b) { return a.with(b); });
}

// Writes the gradients of a row's logits, which may be in the same place, of the block's: exponentials times `inverse`, less
// `scale` where the target is. `target` may be no class of the row.
template <int V, class T>
__device__ __forceinline__ void gradients_of_row(const T* row, T* grad, u64 numel, bool vectors, u64 target, float max,
                                                 float inverse, float scale) {
    for_each_of_row<V>(row, numel, vectors, [&](auto& x, u64 at) {
        constexpr int N = sizeof(x) / sizeof(float);
        UNROLL
        for (int k = 0; k < N; k++) x[k] = fast_exponential(x[k] - max);
        const u64 own = target - at;  // wraps below
        if (own < N) {
            UNROLL
            for (int k = 0; k < N; k++) x[k] = u64(k) == own ? fmaf(x[k], inverse, -scale) : x[k] * inverse;
        } else {
            UNROLL
            for (int k = 0; k < N; k++) x[k] *= inverse;
        }
        store(grad + at, x);
    });
}
