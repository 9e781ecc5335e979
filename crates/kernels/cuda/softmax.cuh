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

// A row of the block's, all of whose threads call. `scratch` as in block_reduce.
template <int V, class T>
__device__ __forceinline__ Softmax softmax_of_row(const T* row, u64 numel, bool vectors, Softmax (&scratch)[WARP]) {
    const Softmax nothing = {-infinite(), 0.0f};
    Softmax softmax = nothing;
    for_each_in_block<V>(numel, vectors, [&](auto lanes, u64 at) {
        float x[decltype(lanes)::COUNT];
        load(row + at, x);
        softmax.add(x);
    });
    return block_reduce(softmax, nothing, scratch, [](Softmax a, Softmax b) { return a.with(b); });
}
