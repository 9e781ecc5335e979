// SwiGLU and its gradients, as in src/swiglu.rs, bit for bit: the exponential is our own.
#include "numbers.cuh"

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + exponential(-x));
}

template <class T>
struct SwigluForward {
    const T* gate;
    const T* up;
    T* out;
    u64 numel;
};

template <class T>
__device__ __forceinline__ void forward(const SwigluForward<T>& p) {
    constexpr int V = VECTOR<T>;
    const bool vectors = aligned<V>(p.gate) && aligned<V>(p.up) && aligned<V>(p.out);
    for_each_in_grid<V>(p.numel, vectors, [&](auto lanes, u64 at) {
        constexpr int N = decltype(lanes)::COUNT;
        float gate[N], up[N];
        load(p.gate + at, gate);
        load(p.up + at, up);
        UNROLL
        for (int k = 0; k < N; k++) up[k] = gate[k] * sigmoid(gate[k]) * up[k];
        store(p.out + at, up);
    });
}

template <class T>
struct SwigluBackward {
    const T* gate;
    const T* up;
    const T* dy;
    T* dgate;
    T* dup;
    u64 numel;
};

template <class T>
__device__ __forceinline__ void backward(const SwigluBackward<T>& p) {
    constexpr int V = VECTOR<T>;
    const bool vectors = aligned<V>(p.gate) && aligned<V>(p.up) && aligned<V>(p.dy) && aligned<V>(p.dgate) && aligned<V>(p.dup);
    for_each_in_grid<V>(p.numel, vectors, [&](auto lanes, u64 at) {
        constexpr int N = decltype(lanes)::COUNT;
        float gate[N], up[N], dy[N];
        load(p.gate + at, gate);
        load(p.up + at, up);
        load(p.dy + at, dy);
        UNROLL
        for (int k = 0; k < N; k++) {
            const float s = sigmoid(gate[k]), silu = gate[k] * s;
            // silu' = sigmoid + gate * sigmoid * (1 - sigmoid)
            const float slope = fmaf(silu, 1.0f - s, s);
            up[k] = dy[k] * up[k] * slope;
            dy[k] = dy[k] * silu;
        }
        store(p.dgate + at, up);
        store(p.dup + at, dy);
    });
}

KERNEL(swiglu_forward_f32, SwigluForward<float>) { forward(p); }
KERNEL(swiglu_forward_bf16, SwigluForward<bf16>) { forward(p); }
KERNEL(swiglu_forward_f16, SwigluForward<f16>) { forward(p); }
KERNEL(swiglu_backward_f32, SwigluBackward<float>) { backward(p); }
KERNEL(swiglu_backward_bf16, SwigluBackward<bf16>) { backward(p); }
KERNEL(swiglu_backward_f16, SwigluBackward<f16>) { backward(p); }
