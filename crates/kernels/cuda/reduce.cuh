// Reductions over the threads of a block, in an order that depends on the number of threads only.
#pragma once
#include "numbers.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

// Combines the `x` of all threads, of a whole number of warps; each thread gets the same bits. `combine` must not care for the order
// of its two operands. Lanes are combined in a butterfly, then the results of warps. `scratch` is shared, and free
// to be used again after the call.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, T identity, T (&scratch)[WARP], Combine combine) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, num_warps = blockDim.x / WARP;
    ROLLED
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = combine(x, x.from_lane(lane ^ distance));
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < num_warps ? scratch[lane] : identity;
    ROLLED
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = combine(x, x.from_lane(lane ^ distance));
    __syncthreads();
    return x;
}

struct Sum {
    float value;
    __device__ __forceinline__ Sum from_lane(int lane) const {
        return Sum{__shfl_sync(ALL_LANES, value, lane)};
    }
};

__device__ __forceinline__ float block_sum(float x, Sum (&scratch)[WARP]) {
    return block_reduce(Sum{x}, Sum{0.0f}, scratch, [](Sum a, Sum b) { return Sum{a.value + b.value}; }).value;
}
