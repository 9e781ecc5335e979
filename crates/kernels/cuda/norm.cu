// Sums of squares in double, in the order of src/norm.rs: within a block of 65536 elements, element i goes to sum i % 32, the 32
// sums are added pairwise, and blocks in order. So the norm has the bits of the CPU's, on every device: a run that keeps its
// gradients on the host clips just as one that does not.
//
// The sum is finite exactly when all elements are.
#include "numbers.cuh"
#include "reduce.cuh"

constexpr u64 BLOCK_NUMEL = 65536;

template <class T>
struct SumOfSquares {
    const T* x;
    // One for each block of elements.
    double* sums;
    u64 numel;
};

// A warp takes a block of elements, a lane one of its 32 sums.
template <class T>
__device__ __forceinline__ void sum_of_squares(const SumOfSquares<T>& p) {
    const u64 num_blocks = (p.numel + BLOCK_NUMEL - 1) / BLOCK_NUMEL;
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (u64 block = u64(blockIdx.x) * warps + threadIdx.x / WARP; block < num_blocks; block += u64(gridDim.x) * warps) {
        const u64 left = p.numel - block * BLOCK_NUMEL;
        const u32 numel = u32(left < BLOCK_NUMEL ? left : BLOCK_NUMEL);
        const T* x = p.x + block * BLOCK_NUMEL;
        double sum = 0.0;
        u32 at = lane;
        // Many loads under way, as few warps share the work.
        constexpr u32 AHEAD = 16;
        for (; at + (AHEAD - 1) * WARP < numel; at += AHEAD * WARP) {
            float ahead[AHEAD];
            UNROLL
            for (u32 k = 0; k < AHEAD; k++) ahead[k] = widen(x[at + k * WARP]);
            // The square of a float is exact in double, so a fused operation rounds as two do.
            UNROLL
            for (u32 k = 0; k < AHEAD; k++) sum = fma(double(ahead[k]), double(ahead[k]), sum);
        }
        for (; at < numel; at += WARP) {
            const double wide = widen(x[at]);
            sum = fma(wide, wide, sum);
        }
        for (u32 width = WARP / 2; width > 0; width /= 2) sum += __shfl_down_sync(ALL_LANES, sum, width);
        if (lane == 0) p.sums[block] = sum;
    }
}

KERNEL(sum_of_squares_f32, SumOfSquares<float>) { sum_of_squares(p); }
KERNEL(sum_of_squares_bf16, SumOfSquares<bf16>) { sum_of_squares(p); }
KERNEL(sum_of_squares_f16, SumOfSquares<f16>) { sum_of_squares(p); }

struct SumInOrder {
    const double* terms;
    double* total;
    u64 numel;
};

// 0 + term 0 + term 1 + ..., by one thread; the others of its block fetch. One block.
KERNEL(sum_in_order, SumInOrder) {
    SHARED(double, fetched, [256]);
    double total = 0.0;
    for (u64 start = 0; start < p.numel; start += blockDim.x) {
        const u64 left = p.numel - start, count = left < blockDim.x ? left : blockDim.x;
        if (threadIdx.x < count) fetched[threadIdx.x] = p.terms[start + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) {
            for (u32 i = 0; i < count; i++) total += fetched[i];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) *p.total = total;
}
