// Reductions over the threads of a block, in an order that depends on the number of threads only.
#pragma once
#include "numbers.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

// Combines the `x` of each group of `group_threads` threads that follow each other, of whole warps; each thread gets the same bits as
// the others of its group. All threads of the block call. `combine` must not care for the order of its two operands. Lanes are combined
// in a butterfly, then the results of warps. `scratch` is shared, and free to be used again after the call.
template <class T, class Combine>
__device__ __forceinline__ T group_reduce(u32 group_threads, T x, T identity, T (&scratch)[WARP], Combine combine) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int num_warps = group_threads / WARP, first_warp = warp / num_warps * num_warps;
    ROLLED
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = combine(x, x.from_lane(lane ^ distance));
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < num_warps ? scratch[first_warp + lane] : identity;
    ROLLED
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = combine(x, x.from_lane(lane ^ distance));
    __syncthreads();
    return x;
}

// ... of all threads of the block.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, T identity, T (&scratch)[WARP], Combine combine) {
    return group_reduce(blockDim.x, x, identity, scratch, combine);
}
