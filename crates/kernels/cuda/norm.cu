// Sums of squares in double, in the order of src/norm.rs: within a block of 65536 elements, element i goes to sum i % 32, the 32
// sums are added pairwise, and blocks in order. So the norm has the bits of the CPU's, on every device: a run that keeps its
// gradients on the host clips just as one that does not.
//
// The sum is finite exactly when all elements are.
#include "numbers.cuh"
#include "reduce.cuh"

constexpr u64 BLOCK_NUMEL = 65536;
constexpr int MAX_ARRAYS = 64;

struct Squared {
    const void* x;
    u64 numel;
    // Blocks of the arrays before this one.
    u64 first;
};

// Many arrays at once: each alone would leave most of a device idle.
struct SumsOfSquares {
    // One for each block of elements, of all arrays.
    double* blocks;
    // One for each array.
    double* totals;
    u64 num_blocks;
    u32 num_arrays;
    Squared arrays[MAX_ARRAYS];
};

// A warp takes a block of elements, a lane one of its 32 sums.
template <class T>
__device__ __forceinline__ void sum_of_squares(const SumsOfSquares& p) {
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (u64 block = u64(blockIdx.x) * warps + threadIdx.x / WARP; block < p.num_blocks; block += u64(gridDim.x) * warps) {
        const Squared& array = p.arrays[array_of(p.arrays, p.num_arrays, block)];
        const u64 start = (block - array.first) * BLOCK_NUMEL, left = array.numel - start;
        const u32 numel = u32(left < BLOCK_NUMEL ? left : BLOCK_NUMEL);
        const T* x = static_cast<const T*>(array.x) + start;
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
        if (lane == 0) p.blocks[block] = sum;
    }
}

KERNEL(sum_of_squares_f32, SumsOfSquares) { sum_of_squares<float>(p); }
KERNEL(sum_of_squares_bf16, SumsOfSquares) { sum_of_squares<bf16>(p); }
KERNEL(sum_of_squares_f16, SumsOfSquares) { sum_of_squares<f16>(p); }

// 0 + term 0 + term 1 + ..., by one thread of the block; the others fetch.
__device__ __forceinline__ void add_in_order(const double* terms, u64 numel, double* sum) {
    SHARED(double, fetched, [256]);
    double total = 0.0;
    for (u64 start = 0; start < numel; start += blockDim.x) {
        const u64 left = numel - start, count = left < blockDim.x ? left : blockDim.x;
        if (threadIdx.x < count) fetched[threadIdx.x] = terms[start + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) {
            for (u32 i = 0; i < count; i++) total += fetched[i];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) *sum = total;
}

// The sums of an array's blocks in order. A block for each array.
KERNEL(sum_blocks_in_order, SumsOfSquares) {
    for (u32 array = blockIdx.x; array < p.num_arrays; array += gridDim.x) {
        const u64 first = p.arrays[array].first;
        const u64 end = array + 1 < p.num_arrays ? p.arrays[array + 1].first : p.num_blocks;
        add_in_order(p.blocks + first, end - first, p.totals + array);
    }
}

struct SumInOrder {
    const double* terms;
    double* total;
    u64 numel;
};

// One block.
KERNEL(sum_in_order, SumInOrder) { add_in_order(p.terms, p.numel, p.total); }
