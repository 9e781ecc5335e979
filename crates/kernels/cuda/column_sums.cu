// Sums of columns whose parts are there, one from each block of another kernel: gradients of weights and biases.
//
// A block has 32 columns; threads of a column take turns at the parts, then add up in a tree: a fixed order.
#include "numbers.cuh"

template <class T>
struct ColumnSums {
    // [num_partials, width]
    const float* partials;
    T* sums;
    u64 num_partials;
    u64 width;
};

template <class T>
__device__ __forceinline__ void column_sums(const ColumnSums<T>& p) {
    constexpr u32 COLUMNS = 32, TURNS = 8;
    SHARED(float, sums, [TURNS][COLUMNS]);
    const u32 turn = threadIdx.x / COLUMNS, column_here = threadIdx.x % COLUMNS;
    const u64 column = u64(blockIdx.x) * COLUMNS + column_here;
    float sum = 0.0f;
    if (column < p.width) {
        u64 partial = turn;
        // Several loads under way, added in the same order.
        constexpr u32 AHEAD = 8;
        for (; partial + (AHEAD - 1) * TURNS < p.num_partials; partial += AHEAD * TURNS) {
            float ahead[AHEAD];
            UNROLL
            for (u32 k = 0; k < AHEAD; k++) ahead[k] = p.partials[(partial + k * TURNS) * p.width + column];
            UNROLL
            for (u32 k = 0; k < AHEAD; k++) sum += ahead[k];
        }
        for (; partial < p.num_partials; partial += TURNS) sum += p.partials[partial * p.width + column];
    }
    sums[turn][column_here] = sum;
    for (u32 width = TURNS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (turn < width) sums[turn][column_here] += sums[turn + width][column_here];
    }
    if (turn == 0 && column < p.width) p.sums[column] = round_to<T>(sums[0][column_here]);
}

KERNEL(column_sums_f32, ColumnSums<float>) { column_sums(p); }
KERNEL(column_sums_bf16, ColumnSums<bf16>) { column_sums(p); }
KERNEL(column_sums_f16, ColumnSums<f16>) { column_sums(p); }
