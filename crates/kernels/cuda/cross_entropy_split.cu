// Cross-entropy where a device has the logits of some classes only, as in src/cross_entropy/split.rs, which has the formulas.
//
//     partial      a block takes a row      what the other ranks have to know of it; sums differ from the CPU's in rounding
//     combine      a thread takes a row     the CPU's bits, of the same parts
//     gradients    a block takes a row      the CPU's bits, of the same rows, but for a GPU's exponentials
//
// A row whose target is no class has the loss NaN and no gradient, and is told.
#include "softmax.cuh"

struct RowStats {
    float max;
    float sum;
    float target;
};

// Whole rows' softmax, between combine and gradients.
struct RowSoftmax {
    double sum;
    float max;
};

__device__ __forceinline__ bool is_class(i64 target, u64 num_classes) {
    return target >= 0 && u64(target) < num_classes;
}

template <class T>
struct SplitPartial {
    const T* logits;
    const i64* targets;
    RowStats* out;
    // As in cross_entropy.cu.
    u64* bad_row;
    u64 rows;
    // Classes here, from a row to the next in elements, and the first of them among all.
    u64 width;
    u64 stride;
    u64 first_class;
    u64 num_classes;
};

template <class T>
__device__ __forceinline__ void partial(const SplitPartial<T>& p) {
    SHARED(Softmax, scratch, [WARP]);
    constexpr int V = VECTOR<T>;
    const bool vectors = p.stride % V == 0 && aligned<V>(p.logits);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* logits = p.logits + row * p.stride;
        const Softmax softmax = softmax_of_row<V>(logits, p.width, vectors, scratch);
        if (threadIdx.x != 0) continue;
        const i64 target = p.targets[row];
        float of_target = 0.0f;
        if (!is_class(target, p.num_classes)) {
            atomicMin(p.bad_row, row);
            of_target = float(not_a_number());
        } else if (u64(target) - p.first_class < p.width) {  // wraps below the first
            of_target = widen(logits[u64(target) - p.first_class]);
        }
        p.out[row] = RowStats{softmax.max, softmax.sum, of_target};
    }
}

struct SplitCombine {
    // [num_parts, rows]
    const RowStats* parts;
    RowSoftmax* softmax;
    double* losses;
    u64 num_parts;
    u64 rows;
};

KERNEL(cross_entropy_combine, SplitCombine) {
    for_each_in_grid<1>(p.rows, false, [&](auto, u64 row) {
        float max = -infinite();
        for (u64 part = 0; part < p.num_parts; part++) max = larger(p.parts[part * p.rows + row].max, max);
        double sum = 0.0;
        float target = 0.0f;
        for (u64 part = 0; part < p.num_parts; part++) {
            const RowStats stats = p.parts[part * p.rows + row];
            // Where all is masked, the sum is 0, or NaN if some logit is.
            const float base = stats.max == -infinite() ? max : stats.max;
            sum += double(stats.sum) * double(exponential(base - max));
            target += stats.target;
        }
        p.softmax[row] = RowSoftmax{sum, max};
        p.losses[row] = loss_of(max, sum, target);
    });
}

template <class T>
struct SplitGradients {
    // Written over.
    T* logits;
    const i64* targets;
    const RowSoftmax* softmax;
    u64 rows;
    u64 width;
    u64 stride;
    u64 first_class;
    u64 num_classes;
    float scale;
};

template <class T>
__device__ __forceinline__ void gradients(const SplitGradients<T>& p) {
    constexpr int V = VECTOR<T>;
    const bool vectors = p.stride % V == 0 && aligned<V>(p.logits);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const i64 target = p.targets[row];
        if (!is_class(target, p.num_classes)) continue;
        T* logits = p.logits + row * p.stride;
        const RowSoftmax softmax = p.softmax[row];
        const float inverse = float(double(p.scale) / softmax.sum);
        const u64 own = u64(target) - p.first_class;  // wraps below the first
        gradients_of_row<V>(logits, logits, p.width, vectors, own, softmax.max, inverse, p.scale);
    }
}

KERNEL(cross_entropy_partial_f32, SplitPartial<float>) { partial(p); }
KERNEL(cross_entropy_partial_bf16, SplitPartial<bf16>) { partial(p); }
KERNEL(cross_entropy_partial_f16, SplitPartial<f16>) { partial(p); }
KERNEL(cross_entropy_gradients_f32, SplitGradients<float>) { gradients(p); }
KERNEL(cross_entropy_gradients_bf16, SplitGradients<bf16>) { gradients(p); }
KERNEL(cross_entropy_gradients_f16, SplitGradients<f16>) { gradients(p); }
