// Cross-entropy of a softmax and the gradient of its logits, in place if asked, as in src/cross_entropy.rs. A block takes a row.
//
//     read a row once: maximum and sum of exponentials together       read it again: write the gradient
//
// The sum is kept relative to the largest element so far and scaled down when a larger one comes, which rounds
// differently from the CPU's two passes. On a GPU exponentials are its approximations.
#include "softmax.cuh"

template <class T>
struct CrossEntropy {
    const T* logits;
    // Where gradients go: nowhere, over the logits, or elsewhere.
    T* grad;
    const i64* targets;
    double* losses;
    // The first row whose target is no class: the smallest of what stands there and those found.
    u64* bad_row;
    u64 rows;
    u64 classes;
    // From a row to the next, in elements.
    u64 stride;
    float scale;
};

template <class T>
__device__ __forceinline__ void cross_entropy(const CrossEntropy<T>& p) {
    SHARED(Softmax, scratch, [WARP]);
    constexpr int V = VECTOR<T>;
    const bool vectors = p.stride % V == 0 && aligned<V>(p.logits) && aligned<V>(p.grad);
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* logits = p.logits + row * p.stride;
        const i64 target = p.targets[row];
        if (target < 0 || u64(target) >= p.classes) {
            if (threadIdx.x == 0) {
                atomicMin(p.bad_row, row);
                p.losses[row] = not_a_number();
            }
            continue;
        }
        // Read before anyone writes: between stands the reduction.
        const float of_target = widen(logits[target]);
        const Softmax softmax = softmax_of_row<V>(logits, p.classes, vectors, scratch);
        // Minus infinity only: no probabilities.
        const double sum = softmax.max == -infinite() ? not_a_number() : double(softmax.sum);
        if (threadIdx.x == 0) {
            p.losses[row] = loss_of(softmax.max, sum, of_target);
        }
        if (p.grad == nullptr) continue;
        const float inverse = float(double(p.scale) / sum);
        T* grad = p.grad + row * p.stride;
        gradients_of_row<V>(logits, grad, p.classes, vectors, u64(target), softmax.max, inverse, p.scale);
    }
}

KERNEL(cross_entropy_f32, CrossEntropy<float>) { cross_entropy(p); }
KERNEL(cross_entropy_bf16, CrossEntropy<bf16>) { cross_entropy(p); }
KERNEL(cross_entropy_f16, CrossEntropy<f16>) { cross_entropy(p); }
