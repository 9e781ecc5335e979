// Root-mean-square normalization of rows, alone or of a sum, as in src/rms_norm.rs and src/rms_norm/fused.rs, which have the formulas.
// A block of threads takes a row.
//
// Sums over a row are a thread's own elements in order, then the block's tree, so they differ from the CPU's in rounding.
#include "numbers.cuh"
#include "reduce.cuh"

template <class T>
struct RmsNormForward {
    const T* x;
    const T* weight;
    T* out;
    float* inv_rms;
    u64 rows;
    u64 width;
    float eps;
};

// Of a sum, rounded as if it was made apart.
template <class T>
struct AddRmsNormForward {
    const T* x;
    const T* residual;
    T* sum;
    const T* weight;
    T* out;
    float* inv_rms;
    u64 rows;
    u64 width;
    float eps;
};

template <class T>
__device__ __forceinline__ float rounded(float x) {
    return widen(round_to<T>(x));
}

// Normalizes the rows of `xs`. `take` reads elements of them, and may be what makes them.
template <class T, class Params, class Take>
__device__ __forceinline__ void normalize(const Params& p, const T* xs, bool aligned_too, Take take) {
    SHARED(Sum, scratch, [WARP]);
    constexpr int V = VECTOR<T>;
    const bool vectors =
        aligned_too && p.width % V == 0 && aligned<V>(xs) && aligned<V>(p.weight) && aligned<V>(p.out);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* x = xs + row * p.width;
        T* out = p.out + row * p.width;
        float squares = 0.0f;
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float some[N];
            take(row * p.width + at, some);
            UNROLL
            for (int k = 0; k < N; k++) squares = fmaf(some[k], some[k], squares);
        });
        squares = block_sum(squares, scratch);
        const float factor = 1.0f / sqrtf(squares / float(p.width) + p.eps);
        if (threadIdx.x == 0) p.inv_rms[row] = factor;
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float some[N], weight[N];
            load(x + at, some);
            load(p.weight + at, weight);
            UNROLL
            for (int k = 0; k < N; k++) some[k] = some[k] * factor * weight[k];
            store(out + at, some);
        });
    }
}

template <class T>
__device__ __forceinline__ void forward(const RmsNormForward<T>& p) {
    normalize(p, p.x, true, [&](u64 at, auto& some) { load(p.x + at, some); });
}

template <class T>
__device__ __forceinline__ void forward(const AddRmsNormForward<T>& p) {
    constexpr int V = VECTOR<T>;
    const T* sums = p.sum;
    // A thread reads again only what it has written itself.
    normalize(p, sums, aligned<V>(p.x) && aligned<V>(p.residual), [&](u64 at, auto& some) {
        constexpr int N = sizeof(some) / sizeof(float);
        float addend[N];
        load(p.x + at, some);
        load(p.residual + at, addend);
        UNROLL
        for (int k = 0; k < N; k++) some[k] = rounded<T>(some[k] + addend[k]);
        store(p.sum + at, some);
    });
}

template <class T>
struct RmsNormBackward {
    const T* x;
    const T* weight;
    const float* inv_rms;
    const T* dy;
    T* dx;
    // [blocks of the grid, width]: each block's gradient of the weight.
    float* partial_dweight;
    u64 rows;
    u64 width;
};

// Of a sum, `x`, which is used elsewhere too: `dsum` is its gradient from there.
template <class T>
struct AddRmsNormBackward : RmsNormBackward<T> {
    const T* dsum;
};

// Rows up to here have their sums in shared memory (cuda/layers.rs asks for it), others in global memory.
constexpr u64 MAX_SHARED_WIDTH = 10240;

// `finish` sees gradients before they are stored.
template <class T, class Finish>
__device__ __forceinline__ void gradients(const RmsNormBackward<T>& p, bool aligned_too, Finish finish) {
    SHARED(Sum, scratch, [WARP]);
    DYNAMIC_SHARED(float, shared_dweight);
    constexpr int V = VECTOR<T>;
    const bool vectors = aligned_too && p.width % V == 0 && aligned<V>(p.x) && aligned<V>(p.weight) && aligned<V>(p.dy) &&
                         aligned<V>(p.dx);
    float* partial = p.partial_dweight + blockIdx.x * p.width;
    // A thread has the same columns in each row, so nobody else touches its part of the sums.
    const bool in_shared = p.width <= MAX_SHARED_WIDTH;
    float* dweight = in_shared ? shared_dweight : partial;
    // Where the sum of column `at + k` is. In shared memory, the columns of neighbouring threads are neighbours, and so in banks of
    // their own.
    auto place = [&](auto lanes, u64 at, int k) {
        constexpr int N = decltype(lanes)::COUNT;
        return in_shared ? k * (p.width / N) + at / N : at + k;
    };
    for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
        UNROLL
        for (int k = 0; k < decltype(lanes)::COUNT; k++) dweight[place(lanes, at, k)] = 0.0f;
    });
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* x = p.x + row * p.width;
        const T* dy = p.dy + row * p.width;
        T* dx = p.dx + row * p.width;
        const float factor = p.inv_rms[row];
        float dot = 0.0f;
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x_[N], weight[N], dy_[N];
            load(x + at, x_);
            load(p.weight + at, weight);
            load(dy + at, dy_);
            UNROLL
            for (int k = 0; k < N; k++) dot = fmaf(weight[k] * dy_[k], x_[k], dot);
        });
        dot = block_sum(dot, scratch);
        const float minus_pull = -(factor * factor * (dot / float(p.width)));
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x_[N], weight[N], dy_[N], dx_[N];
            load(x + at, x_);
            load(p.weight + at, weight);
            load(dy + at, dy_);
            UNROLL
            for (int k = 0; k < N; k++) {
                dx_[k] = factor * fmaf(x_[k], minus_pull, weight[k] * dy_[k]);
                float& sum = dweight[place(lanes, at, k)];
                sum = fmaf(dy_[k] * factor, x_[k], sum);
            }
            finish(row * p.width + at, dx_);
            store(dx + at, dx_);
        });
    }
    if (in_shared) {
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            UNROLL
            for (int k = 0; k < decltype(lanes)::COUNT; k++) partial[at + k] = dweight[place(lanes, at, k)];
        });
    }
}

template <class T>
__device__ __forceinline__ void backward(const RmsNormBackward<T>& p) {
    gradients(p, true, [](u64, auto&) {});
}

template <class T>
__device__ __forceinline__ void backward(const AddRmsNormBackward<T>& p) {
    gradients(p, aligned<VECTOR<T>>(p.dsum), [&](u64 at, auto& dx) {
        constexpr int N = sizeof(dx) / sizeof(float);
        float dsum[N];
        load(p.dsum + at, dsum);
        UNROLL
        for (int k = 0; k < N; k++) dx[k] = dsum[k] + rounded<T>(dx[k]);
    });
}

struct RmsNormWeightGrad {
    const float* partial_dweight;
    float* dweight;
    u64 num_partials;
    u64 width;
};

// Adds the partial gradients of 32 columns: 8 threads a column take turns at the partials, then add up in a tree.
KERNEL(rms_norm_weight_grad, RmsNormWeightGrad) {
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
            for (u32 k = 0; k < AHEAD; k++) ahead[k] = p.partial_dweight[(partial + k * TURNS) * p.width + column];
            UNROLL
            for (u32 k = 0; k < AHEAD; k++) sum += ahead[k];
        }
        for (; partial < p.num_partials; partial += TURNS) sum += p.partial_dweight[partial * p.width + column];
    }
    sums[turn][column_here] = sum;
    for (u32 width = TURNS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (turn < width) sums[turn][column_here] += sums[turn + width][column_here];
    }
    if (turn == 0 && column < p.width) p.dweight[column] = sums[0][column_here];
}

KERNEL(rms_norm_forward_f32, RmsNormForward<float>) { forward(p); }
KERNEL(rms_norm_forward_bf16, RmsNormForward<bf16>) { forward(p); }
KERNEL(rms_norm_forward_f16, RmsNormForward<f16>) { forward(p); }
KERNEL(rms_norm_backward_f32, RmsNormBackward<float>) { backward(p); }
KERNEL(rms_norm_backward_bf16, RmsNormBackward<bf16>) { backward(p); }
KERNEL(rms_norm_backward_f16, RmsNormBackward<f16>) { backward(p); }
KERNEL(add_rms_norm_forward_f32, AddRmsNormForward<float>) { forward(p); }
KERNEL(add_rms_norm_forward_bf16, AddRmsNormForward<bf16>) { forward(p); }
KERNEL(add_rms_norm_forward_f16, AddRmsNormForward<f16>) { forward(p); }
KERNEL(add_rms_norm_backward_f32, AddRmsNormBackward<float>) { backward(p); }
KERNEL(add_rms_norm_backward_bf16, AddRmsNormBackward<bf16>) { backward(p); }
KERNEL(add_rms_norm_backward_f16, AddRmsNormBackward<f16>) { backward(p); }
