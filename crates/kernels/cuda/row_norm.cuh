// Normalization of rows, alone or of a sum: RMS norm as in src/rms_norm.rs and src/rms_norm/fused.rs, LayerNorm as in src/layer_norm.rs.
// These have the formulas; RMS norm is LayerNorm whose mean is zero and which has no bias.
//
//     forward     a block takes a row: reads it, then writes it from the cache
//     backward    a block takes as many rows at a time as keep its threads busy, and adds up their gradients of weight and bias
//
// Sums over a row are a thread's own elements in order, then a tree of threads, so they differ from the CPU's in rounding.
#pragma once
#include "numbers.cuh"
#include "reduce.cuh"

template <class T>
struct NormForward {
    const T* x;
    const T* weight;
    // LayerNorm's.
    const T* bias;
    T* out;
    // Of each row 1 / sqrt(.. + eps), and LayerNorm's mean.
    float* factors;
    float* means;
    u64 rows;
    u64 width;
    float eps;
};

// Of a sum, rounded as if it was made apart.
template <class T>
struct AddNormForward {
    // Whose `x` is added to the residual.
    NormForward<T> norm;
    const T* residual;
    T* sum;
};

template <class T>
struct NormBackward {
    const T* x;
    const T* weight;
    const float* factors;
    const float* means;
    const T* dy;
    T* dx;
    // [blocks of the grid, Norm::NUM_SUMS, width]: each block's gradient of the weight, and of LayerNorm's bias.
    float* partials;
    u64 rows;
    u64 width;
};

// Of a sum, `x`, which is used elsewhere too: `dsum` is its gradient from there.
template <class T>
struct AddNormBackward {
    NormBackward<T> norm;
    const T* dsum;
};

// The mean of squares.
struct Squares {
    float sum;

    __device__ __forceinline__ Squares from_lane(int lane) const {
        return Squares{__shfl_sync(ALL_LANES, sum, lane)};
    }
    __device__ __forceinline__ Squares with(Squares other) const {
        return Squares{sum + other.sum};
    }
    template <int N>
    __device__ __forceinline__ void add(const float (&x)[N]) {
        UNROLL
        for (int k = 0; k < N; k++) sum = fmaf(x[k], x[k], sum);
    }
    __device__ __forceinline__ float centre() const {
        return 0.0f;
    }
};

// Mean and sum of squared distances from it, so that nothing cancels; parts are joined by Chan, Golub and LeVeque's formula.
struct Moments {
    float sum;
    float count;
    float mean;

    __device__ __forceinline__ Moments from_lane(int lane) const {
        return Moments{__shfl_sync(ALL_LANES, sum, lane), __shfl_sync(ALL_LANES, count, lane),
                       __shfl_sync(ALL_LANES, mean, lane)};
    }
    // The same bits in either order.
    __device__ __forceinline__ Moments with(Moments other) const {
        const float both = count + other.count, inverse = both > 0.0f ? 1.0f / both : 0.0f;
        const float distance = mean - other.mean;
        return Moments{sum + other.sum + distance * distance * (count * other.count * inverse), both,
                       (count * mean + other.count * other.mean) * inverse};
    }
    template <int N>
    __device__ __forceinline__ void add(const float (&x)[N]) {
        float total = 0.0f, squares = 0.0f;
        UNROLL
        for (int k = 0; k < N; k++) total += x[k];
        const float middle = total * (1.0f / N);
        UNROLL
        for (int k = 0; k < N; k++) squares = fmaf(x[k] - middle, x[k] - middle, squares);
        *this = with(Moments{squares, float(N), middle});
    }
    __device__ __forceinline__ float centre() const {
        return mean;
    }
};

struct RmsNorm {
    typedef Squares Stats;
    static constexpr bool IS_CENTRED = false;
    // Of a column, over rows: the gradient of the weight.
    static constexpr int NUM_SUMS = 1;
};

struct LayerNorm {
    typedef Moments Stats;
    static constexpr bool IS_CENTRED = true;
    // ... and of the bias.
    static constexpr int NUM_SUMS = 2;
};

template <class T>
__device__ __forceinline__ float rounded(float x) {
    return widen(round_to<T>(x));
}

// Normalizes the rows of `xs`. `take` reads elements of them, and may be what makes them.
template <class Norm, class T, class Take>
__device__ __forceinline__ void normalize(const NormForward<T>& p, const T* xs, bool aligned_too, Take take) {
    typedef typename Norm::Stats Stats;
    SHARED(Stats, scratch, [WARP]);
    constexpr int V = VECTOR<T>;
    const bool vectors = aligned_too && p.width % V == 0 && aligned<V>(xs) && aligned<V>(p.weight) && aligned<V>(p.bias) &&
                         aligned<V>(p.out);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* x = xs + row * p.width;
        T* out = p.out + row * p.width;
        Stats stats = {};
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            float some[decltype(lanes)::COUNT];
            take(row * p.width + at, some);
            stats.add(some);
        });
        stats = block_reduce(stats, Stats{}, scratch, [](Stats a, Stats b) { return a.with(b); });
        const float centre = stats.centre(), factor = 1.0f / sqrtf(stats.sum / float(p.width) + p.eps);
        if (threadIdx.x == 0) {
            p.factors[row] = factor;
            if constexpr (Norm::IS_CENTRED) p.means[row] = centre;
        }
        for_each_in_block<V>(p.width, vectors, [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float some[N], weight[N];
            load(x + at, some);
            load(p.weight + at, weight);
            if constexpr (Norm::IS_CENTRED) {
                float bias[N];
                load(p.bias + at, bias);
                UNROLL
                for (int k = 0; k < N; k++) some[k] = fmaf((some[k] - centre) * factor, weight[k], bias[k]);
            } else {
                UNROLL
                for (int k = 0; k < N; k++) some[k] = some[k] * factor * weight[k];
            }
            store(out + at, some);
        });
    }
}

template <class Norm, class T>
__device__ __forceinline__ void forward(const NormForward<T>& p) {
    normalize<Norm>(p, p.x, true, [&](u64 at, auto& some) { load(p.x + at, some); });
}

template <class Norm, class T>
__device__ __forceinline__ void forward(const AddNormForward<T>& p) {
    constexpr int V = VECTOR<T>;
    const T* x = p.norm.x;
    const T* sums = p.sum;
    // A thread reads again only what it has written itself.
    normalize<Norm>(p.norm, sums, aligned<V>(x) && aligned<V>(p.residual), [&](u64 at, auto& some) {
        constexpr int N = sizeof(some) / sizeof(float);
        float addend[N];
        load(x + at, some);
        load(p.residual + at, addend);
        UNROLL
        for (int k = 0; k < N; k++) some[k] = rounded<T>(some[k] + addend[k]);
        store(p.sum + at, some);
    });
}

// Sums of columns that a block can have in shared memory, of all rows that it takes at a time; others are in global memory, and rows
// are taken one at a time (cuda/row_norm.rs).
constexpr u32 MAX_SHARED_SUMS = 10240;

// Threads of a row: LaunchPlan::rows.
template <int V>
__device__ __forceinline__ u32 threads_of_row(u32 width) {
    const u32 most = 256, vectors = width / V + (width % V != 0);
    return vectors == 0 ? WARP : ((vectors < most ? vectors : most) + WARP - 1) / WARP * WARP;
}

// Over a row: the gradient of what the weight multiplies, times that, and alone.
struct Dots {
    float with_x;
    float alone;

    __device__ __forceinline__ Dots from_lane(int lane) const {
        return Dots{__shfl_sync(ALL_LANES, with_x, lane), __shfl_sync(ALL_LANES, alone, lane)};
    }
};

// Elements of a group's sums over rows of a width.
template <int V>
__device__ __forceinline__ u32 sums_of_row(u32 width) {
    return (width + WARP * V - 1) / (WARP * V) * (WARP * V);
}

// A thread's sums of its columns, in which it adds up its rows. It has the same columns in each row, so nobody else touches them.
//
// In shared memory, the columns of neighbouring threads are neighbours, and so in banks of their own; those of a thread are a constant
// distance apart.
template <bool IN_SHARED>
struct ColumnParts {
    float* first;
    // From a sum to the next.
    u32 stride;

    // Of column `at + k` of those that a thread takes N at a time from `at`, the sum number `i`.
    template <int N>
    __device__ __forceinline__ float& of(int i, u32 at, int k) const {
        const u32 turn = at / N;
        return first[i * stride + (IN_SHARED ? turn / WARP * (WARP * N) + turn % WARP + k * WARP : at + k)];
    }
};

// `finish` sees gradients before they are stored.
template <class Norm, bool IN_SHARED, class T, class Finish>
__device__ __forceinline__ void gradients(const NormBackward<T>& p, u32 group_threads, float* sums, bool vectors, Finish finish) {
    SHARED(Dots, scratch, [WARP]);
    constexpr int V = VECTOR<T>, NUM_SUMS = Norm::NUM_SUMS;
    const u32 width = u32(p.width);
    const u32 num_groups = blockDim.x / group_threads;
    const u32 group = threadIdx.x / group_threads, worker = threadIdx.x % group_threads;
    const u32 stride = IN_SHARED ? sums_of_row<V>(width) : width;
    const ColumnParts<IN_SHARED> parts = {sums + group * NUM_SUMS * stride, stride};
    for_each<V, u32>(worker, group_threads, width, vectors, [&](auto lanes, u32 at) {
        constexpr int N = decltype(lanes)::COUNT;
        UNROLL
        for (int k = 0; k < N; k++) {
            UNROLL
            for (int i = 0; i < NUM_SUMS; i++) parts.template of<N>(i, at, k) = 0.0f;
        }
    });
    const float per_element = 1.0f / float(width);
    for (u64 first = u64(blockIdx.x) * num_groups; first < p.rows; first += u64(gridDim.x) * num_groups) {
        // In the last round some groups may have none.
        const u64 row = first + group;
        const u32 here = row < p.rows ? width : 0;
        const u64 start = row * width;
        const float factor = here > 0 ? p.factors[row] : 0.0f;
        const float centre = Norm::IS_CENTRED && here > 0 ? p.means[row] : 0.0f;
        auto load_row = [&](u32 at, auto& x_, auto& weighted, auto& dy_) {
            constexpr int N = sizeof(x_) / sizeof(float);
            load(p.x + (start + at), x_);
            load(p.weight + at, weighted);
            load(p.dy + (start + at), dy_);
            UNROLL
            for (int k = 0; k < N; k++) {
                if constexpr (Norm::IS_CENTRED) x_[k] -= centre;
                weighted[k] *= dy_[k];
            }
        };
        Dots dots = {0.0f, 0.0f};
        for_each<V, u32>(worker, group_threads, here, vectors, [&](auto lanes, u32 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x_[N], weighted[N], dy_[N];
            load_row(at, x_, weighted, dy_);
            UNROLL
            for (int k = 0; k < N; k++) {
                dots.with_x = fmaf(weighted[k], x_[k], dots.with_x);
                if constexpr (Norm::IS_CENTRED) dots.alone += weighted[k];
            }
        });
        dots = group_reduce(group_threads, dots, Dots{0.0f, 0.0f}, scratch, [](Dots a, Dots b) {
            return Dots{a.with_x + b.with_x, Norm::IS_CENTRED ? a.alone + b.alone : 0.0f};
        });
        const float minus_pull = -(factor * factor * (dots.with_x * per_element)), shift = dots.alone * per_element;
        for_each<V, u32>(worker, group_threads, here, vectors, [&](auto lanes, u32 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x_[N], weighted[N], dy_[N];
            load_row(at, x_, weighted, dy_);
            UNROLL
            for (int k = 0; k < N; k++) {
                float& of_weight = parts.template of<N>(0, at, k);
                of_weight = fmaf(dy_[k] * factor, x_[k], of_weight);
                if constexpr (Norm::IS_CENTRED) parts.template of<N>(1, at, k) += dy_[k];
            }
            UNROLL
            for (int k = 0; k < N; k++) {
                if constexpr (Norm::IS_CENTRED) weighted[k] -= shift;
                weighted[k] = factor * fmaf(x_[k], minus_pull, weighted[k]);
            }
            finish(start + at, weighted);
            store(p.dx + (start + at), weighted);
        });
    }
}

template <class Norm, class T, class Finish>
__device__ __forceinline__ void gradients(const NormBackward<T>& p, bool aligned_too, Finish finish) {
    DYNAMIC_SHARED(float, shared_sums);
    constexpr int V = VECTOR<T>, NUM_SUMS = Norm::NUM_SUMS;
    const u32 width = u32(p.width);
    const bool vectors =
        aligned_too && width % V == 0 && aligned<V>(p.x) && aligned<V>(p.weight) && aligned<V>(p.dy) && aligned<V>(p.dx);
    // Each group of threads takes a row.
    const u32 group_threads = threads_of_row<V>(width), num_groups = blockDim.x / group_threads;
    float* partial = p.partials + blockIdx.x * u64(NUM_SUMS * width);
    const u32 stride = sums_of_row<V>(width);
    if (u64(num_groups) * NUM_SUMS * stride > MAX_SHARED_SUMS) {
        return gradients<Norm, false>(p, group_threads, partial, vectors, finish);
    }
    gradients<Norm, true>(p, group_threads, shared_sums, vectors, finish);
    // The groups' sums, in order.
    __syncthreads();
    for (int i = 0; i < NUM_SUMS; i++) {
        for (u32 column = threadIdx.x; column < width; column += blockDim.x) {
            float total = 0.0f;
            for (u32 group = 0; group < num_groups; group++) {
                const ColumnParts<true> parts = {shared_sums + group * NUM_SUMS * stride, stride};
                total += vectors ? parts.template of<V>(i, column / V * V, column % V) : parts.template of<1>(i, column, 0);
            }
            partial[i * width + column] = total;
        }
    }
}

template <class Norm, class T>
__device__ __forceinline__ void backward(const NormBackward<T>& p) {
    gradients<Norm>(p, true, [](u64, auto&) {});
}

template <class Norm, class T>
__device__ __forceinline__ void backward(const AddNormBackward<T>& p) {
    gradients<Norm>(p.norm, aligned<VECTOR<T>>(p.dsum), [&](u64 at, auto& dx) {
        constexpr int N = sizeof(dx) / sizeof(float);
        float dsum[N];
        load(p.dsum + at, dsum);
        UNROLL
        for (int k = 0; k < N; k++) dx[k] = dsum[k] + rounded<T>(dx[k]);
    });
}

#define NORM_OF(type, T, name, Norm)                                                    \
    KERNEL(name##_forward_##type, NormForward<T>) { forward<Norm>(p); }                 \
    BUSY_KERNEL(name##_backward_##type, NormBackward<T>) { backward<Norm>(p); }         \
    KERNEL(add_##name##_forward_##type, AddNormForward<T>) { forward<Norm>(p); }        \
    BUSY_KERNEL(add_##name##_backward_##type, AddNormBackward<T>) { backward<Norm>(p); }

#define NORM(name, Norm)              \
    NORM_OF(f32, float, name, Norm)   \
    NORM_OF(bf16, bf16, name, Norm)   \
    NORM_OF(f16, f16, name, Norm)
