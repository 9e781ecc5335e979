// LAMB in two passes, as in src/optimizer/lamb.rs, which has the formulas, bit for bit.
//
//     moments      moves the moments; squared norms of each block of elements      in the order of norm.cu
//     norms        adds the blocks' norms: those of a part of a tensor
//     (exchange)   a row of norms from each part, in a table for all tensors
//     apply        adds a tensor's column of the table, and moves the parameters
//
// The norms stay on the device: no pass waits for the host.
#include "numbers.cuh"
#include "reduce.cuh"

constexpr u64 BLOCK_NUMEL = 65536;

struct Factors {
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;

    __device__ __forceinline__ void moments(float g, float& m, float& v) const {
        g = g * grad_scale;
        m = fmaf(one_minus_beta1, g, beta1 * m);
        v = fmaf(one_minus_beta2 * g, g, beta2 * v);
    }

    __device__ __forceinline__ float update(float p, float m, float v) const {
        return fmaf(weight_decay, p, m / (sqrtf(v) + eps));
    }
};

// Of a parameter and of its update.
struct SquaredNorms {
    double param;
    double update;
};

struct LambMoments {
    const float* grad;
    const float* master;
    float* exp_avg;
    float* exp_avg_sq;
    // One for each block of elements.
    SquaredNorms* blocks;
    u64 numel;
    Factors factors;
};

// N elements of a lane, a warp apart.
template <int N>
__device__ __forceinline__ void moments(const LambMoments& p, u64 at, SquaredNorms& sums) {
    float g[N], x[N], m[N], v[N];
    UNROLL
    for (int k = 0; k < N; k++) {
        g[k] = p.grad[at + k * WARP];
        x[k] = p.master[at + k * WARP];
        m[k] = p.exp_avg[at + k * WARP];
        v[k] = p.exp_avg_sq[at + k * WARP];
    }
    UNROLL
    for (int k = 0; k < N; k++) {
        p.factors.moments(g[k], m[k], v[k]);
        p.exp_avg[at + k * WARP] = m[k];
        p.exp_avg_sq[at + k * WARP] = v[k];
        const double param = x[k], update = p.factors.update(x[k], m[k], v[k]);
        // Squares of floats are exact in double, so fused operations round as two do.
        sums.param = fma(param, param, sums.param);
        sums.update = fma(update, update, sums.update);
    }
}

// A warp takes a block of elements, a lane one of its 32 sums.
KERNEL(lamb_moments, LambMoments) {
    const u64 num_blocks = (p.numel + BLOCK_NUMEL - 1) / BLOCK_NUMEL;
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (u64 block = u64(blockIdx.x) * warps + threadIdx.x / WARP; block < num_blocks; block += u64(gridDim.x) * warps) {
        const u64 start = block * BLOCK_NUMEL, left = p.numel - start;
        const u32 numel = u32(left < BLOCK_NUMEL ? left : BLOCK_NUMEL);
        SquaredNorms sums = {0.0, 0.0};
        u32 at = lane;
        // Many loads under way, as few warps share the work.
        constexpr u32 AHEAD = 4;
        for (; at + (AHEAD - 1) * WARP < numel; at += AHEAD * WARP) moments<AHEAD>(p, start + at, sums);
        for (; at < numel; at += WARP) moments<1>(p, start + at, sums);
        for (u32 width = WARP / 2; width > 0; width /= 2) {
            sums.param += __shfl_down_sync(ALL_LANES, sums.param, width);
            sums.update += __shfl_down_sync(ALL_LANES, sums.update, width);
        }
        if (lane == 0) p.blocks[block] = sums;
    }
}

struct LambNorms {
    // Pairs of numbers, one after the other.
    const double* blocks;
    double* total;
    u64 num_blocks;
};

// 0 + block 0 + block 1 + .., by a thread for each of the two; the others of the block fetch. One block.
KERNEL(lamb_norms, LambNorms) {
    constexpr u32 FETCHED = 256;
    SHARED(double, fetched, [FETCHED]);
    double total = 0.0;
    for (u64 start = 0; start < 2 * p.num_blocks; start += FETCHED) {
        const u64 left = 2 * p.num_blocks - start;
        const u32 count = u32(left < FETCHED ? left : FETCHED);
        for (u32 i = threadIdx.x; i < count; i += blockDim.x) fetched[i] = p.blocks[start + i];
        __syncthreads();
        if (threadIdx.x < 2) {
            for (u32 i = threadIdx.x; i < count; i += 2) total += fetched[i];
        }
        __syncthreads();
    }
    if (threadIdx.x < 2) p.total[threadIdx.x] = total;
}

struct LambRowSums {
    // [num_rows, width]
    const double* rows;
    double* sums;
    u64 num_rows;
    u64 width;
};

// 0 + row 0 + row 1 + ..
KERNEL(lamb_row_sums, LambRowSums) {
    for_each_in_grid<1>(p.width, false, [&](auto, u64 at) {
        double sum = 0.0;
        for (u64 row = 0; row < p.num_rows; row++) sum += p.rows[row * p.width + at];
        p.sums[at] = sum;
    });
}

enum CopyType : u32 { COPY_NONE = 0, COPY_BF16 = 1, COPY_F16 = 2 };

struct LambApply {
    float* master;
    const float* exp_avg;
    const float* exp_avg_sq;
    void* copy;
    // The tensor's norms in the first row of the table; the next row's are `row_numel` further.
    const SquaredNorms* norms;
    u64 num_rows;
    u64 row_numel;
    u64 numel;
    double minus_rate;
    double max_coeff;
    double min_coeff;
    u32 copy_type;
    Factors factors;
};

// By the threads of a warp, each of which fetches a row at a time.
__device__ __forceinline__ SquaredNorms sum_of_rows(const LambApply& p) {
    SquaredNorms sum = {0.0, 0.0};
    for (u64 start = 0; start < p.num_rows; start += WARP) {
        const u64 left = p.num_rows - start;
        SquaredNorms row = {0.0, 0.0};
        if (threadIdx.x < left) row = p.norms[(start + threadIdx.x) * p.row_numel];
        for (u32 lane = 0; lane < WARP && lane < left; lane++) {
            sum.param += __shfl_sync(ALL_LANES, row.param, lane);
            sum.update += __shfl_sync(ALL_LANES, row.update, lane);
        }
    }
    return sum;
}

__device__ __forceinline__ double trust_ratio(const LambApply& p, SquaredNorms norms) {
    if (norms.param == 0.0 || norms.update == 0.0) return 1.0;
    double ratio = sqrt(norms.param) / sqrt(norms.update);
    ratio = ratio < p.max_coeff ? ratio : p.max_coeff;
    return ratio > p.min_coeff ? ratio : p.min_coeff;
}

KERNEL(lamb_apply, LambApply) {
    SHARED(float, shared_rate, [1]);
    if (threadIdx.x < WARP) {
        const SquaredNorms norms = sum_of_rows(p);
        if (threadIdx.x == 0) shared_rate[0] = float(p.minus_rate * trust_ratio(p, norms));
    }
    __syncthreads();
    const float minus_rate = shared_rate[0];
    constexpr int V = VECTOR<float>;
    const bool vectors = aligned<V>(p.master) && aligned<V>(p.exp_avg) && aligned<V>(p.exp_avg_sq) &&
                         aligned<V>(static_cast<const u16*>(p.copy));
    for_each_in_grid<V>(p.numel, vectors, [&](auto lanes, u64 at) {
        constexpr int N = decltype(lanes)::COUNT;
        float x[N], m[N], v[N];
        load(p.master + at, x);
        load(p.exp_avg + at, m);
        load(p.exp_avg_sq + at, v);
        UNROLL
        for (int k = 0; k < N; k++) x[k] = fmaf(minus_rate, p.factors.update(x[k], m[k], v[k]), x[k]);
        store(p.master + at, x);
        if (p.copy_type == COPY_BF16) store(static_cast<bf16*>(p.copy) + at, x);
        if (p.copy_type == COPY_F16) store(static_cast<f16*>(p.copy) + at, x);
    });
}
