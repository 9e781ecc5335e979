// One pass of an optimizer: unscale and clip (one factor), update, write the 16-bit copy.
//
// The rules are those of src/optimizer/, which documents them; factors of a step are computed there, in double.
// States are float, or bf16 rounded at random by the same draws as on the CPU.
#include "numbers.cuh"

enum CopyType : u32 { COPY_NONE = 0, COPY_BF16 = 1, COPY_F16 = 2 };
enum GradType : u32 { GRAD_FLOAT = 0, GRAD_BF16 = 1, GRAD_F16 = 2 };

struct Noise {
    u32 key[2];
    u32 name[2];
    u64 first;
};

template <class State, class Rule>
struct Step {
    const void* grad;
    float* master;
    State* states[2];
    void* copy;
    u64 numel;
    Noise noise;
    u32 copy_type, grad_type;
    Rule rule;
};

template <int N>
__device__ __forceinline__ void store_copy(void* copy, u32 type, u64 at, const float (&x)[N]) {
    if (type == COPY_BF16) store(static_cast<bf16*>(copy) + at, x);
    if (type == COPY_F16) store(static_cast<f16*>(copy) + at, x);
}

// States in float: four elements at a time.
template <class Grad, class Rule>
__device__ __forceinline__ void step_over(const Step<float, Rule>& p, const Grad* grads) {
    constexpr int V = VECTOR<float>, K = Rule::NUM_STATES;
    bool vectors = aligned<V>(grads) && aligned<V>(p.master) && aligned<V>(static_cast<const u16*>(p.copy));
    for (int s = 0; s < K; s++) vectors = vectors && aligned<V>(p.states[s]);
    for_each_in_grid<V>(p.numel, vectors, [&](auto lanes, u64 at) {
        constexpr int N = decltype(lanes)::COUNT;
        float grad[N], param[N], states[2][N] = {};
        load(grads + at, grad);
        load(p.master + at, param);
        UNROLL
        for (int s = 0; s < K; s++) load(p.states[s] + at, states[s]);
        UNROLL
        for (int k = 0; k < N; k++) p.rule.update(grad[k], param[k], states[0][k], states[1][k]);
        store(p.master + at, param);
        UNROLL
        for (int s = 0; s < K; s++) store(p.states[s] + at, states[s]);
        store_copy(p.copy, p.copy_type, at, param);
    });
}

// Up or down, by chance, so that the mean is `x`; infinities and NaN stay what they are.
__device__ __forceinline__ bf16 round_at_random(float x, u32 noise16) {
    const u32 bits = __float_as_uint(x);
    return bf16{u16(x != x ? bits >> 16 | 0x40 : (bits + noise16) >> 16)};
}

// States in bf16. Word w of Philox's block 16 c + b belongs to element number 64 c + 16 w + b, so a thread draws a block and
// takes the four elements it is for. Half a warp takes 16 elements in a row: whole sectors, whatever the first number is.
template <class Grad, class Rule>
__device__ __forceinline__ void step_over(const Step<bf16, Rule>& p, const Grad* grads) {
    constexpr int K = Rule::NUM_STATES, GROUP = 64, BLOCKS = 16, WORDS = 4;
    if (p.numel == 0) return;
    const u64 first_block = p.noise.first / GROUP * BLOCKS;
    const u64 num_blocks = ((p.noise.first + p.numel - 1) / GROUP + 1) * BLOCKS - first_block;
    for_each_in_grid<1>(num_blocks, false, [&](auto, u64 i) {
        const u64 block = first_block + i;
        const u64 number = block / BLOCKS * GROUP + block % BLOCKS;
        float grad[WORDS][1], param[WORDS][1], states[2][WORDS][1] = {};
        UNROLL
        for (int w = 0; w < WORDS; w++) {
            const u64 at = number + w * BLOCKS - p.noise.first;  // wraps below the first
            if (at >= p.numel) continue;
            load(grads + at, grad[w]);
            load(p.master + at, param[w]);
            UNROLL
            for (int s = 0; s < K; s++) load(p.states[s] + at, states[s][w]);
        }
        const Philox drawn = philox(block, p.noise.name, p.noise.key);
        UNROLL
        for (int w = 0; w < WORDS; w++) {
            const u64 at = number + w * BLOCKS - p.noise.first;
            if (at >= p.numel) continue;
            p.rule.update(grad[w][0], param[w][0], states[0][w][0], states[1][w][0]);
            p.master[at] = param[w][0];
            UNROLL
            for (int s = 0; s < K; s++)
                p.states[s][at] = round_at_random(states[s][w][0], drawn.words[w] >> 16 * s & 0xffff);
            store_copy(p.copy, p.copy_type, at, param[w]);
        }
    });
}

// A gradient in 16 bits is widened on the way. Its type is that of the launch: all threads take the same loop.
template <class State, class Rule>
__device__ __forceinline__ void step(const Step<State, Rule>& p) {
    if (p.grad_type == GRAD_BF16) step_over(p, static_cast<const bf16*>(p.grad));
    else if (p.grad_type == GRAD_F16) step_over(p, static_cast<const f16*>(p.grad));
    else step_over(p, static_cast<const float*>(p.grad));
}

struct AdamFactors {
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, denom_scale, eps, decay, minus_step_size;
    float weight_decay;

    __device__ __forceinline__ void moved(float g, float& p, float& m, float& v) const {
        m = fmaf(one_minus_beta1, g, beta1 * m);
        v = fmaf(one_minus_beta2 * g, g, beta2 * v);
        const float denom = fmaf(sqrtf(v), denom_scale, eps);
        p = fmaf(minus_step_size, m / denom, p * decay);
    }
};

struct AdamW : AdamFactors {
    static constexpr int NUM_STATES = 2;
    __device__ __forceinline__ void update(float g, float& p, float& m, float& v) const {
        moved(g * grad_scale, p, m, v);
    }
};

struct AdamL2 : AdamFactors {
    static constexpr int NUM_STATES = 2;
    __device__ __forceinline__ void update(float g, float& p, float& m, float& v) const {
        moved(fmaf(weight_decay, p, g * grad_scale), p, m, v);
    }
};

struct SgdFactors {
    float grad_scale, weight_decay, momentum, share, minus_lr;

    __device__ __forceinline__ float decayed(float g, float p) const {
        return fmaf(weight_decay, p, g * grad_scale);
    }
};

struct SgdMomentum : SgdFactors {
    static constexpr int NUM_STATES = 1;
    __device__ __forceinline__ void update(float g, float& p, float& buffer, float&) const {
        buffer = fmaf(share, decayed(g, p), momentum * buffer);
        p = fmaf(minus_lr, buffer, p);
    }
};

struct SgdNesterov : SgdFactors {
    static constexpr int NUM_STATES = 1;
    __device__ __forceinline__ void update(float g, float& p, float& buffer, float&) const {
        g = decayed(g, p);
        buffer = fmaf(share, g, momentum * buffer);
        p = fmaf(minus_lr, fmaf(momentum, buffer, g), p);
    }
};

struct SgdPlain : SgdFactors {
    static constexpr int NUM_STATES = 0;
    __device__ __forceinline__ void update(float g, float& p, float&, float&) const {
        p = fmaf(minus_lr, decayed(g, p), p);
    }
};

struct Lion {
    static constexpr int NUM_STATES = 1;
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, minus_lr;

    // -1, 0 or 1; NaN stays NaN. Twice, as the smallest subnormal number is further from 1 than the range is wide.
    static __device__ __forceinline__ float sign(float x) {
        const float huge = 3.402823466e+38f;
        return larger(-1.0f, smaller(1.0f, x * huge * huge));
    }

    __device__ __forceinline__ void update(float g, float& p, float& mean, float&) const {
        g = g * grad_scale;
        const float direction = fmaf(one_minus_beta1, g, beta1 * mean);
        p = fmaf(minus_lr, sign(direction), p * decay);
        mean = fmaf(one_minus_beta2, g, beta2 * mean);
    }
};

struct Adagrad {
    static constexpr int NUM_STATES = 1;
    float grad_scale, weight_decay, eps, minus_lr;

    __device__ __forceinline__ void update(float g, float& p, float& sum, float&) const {
        g = fmaf(weight_decay, p, g * grad_scale);
        sum = fmaf(g, g, sum);
        p = fmaf(minus_lr, g / (sqrtf(sum) + eps), p);
    }
};

KERNEL(adamw_f32, Step<float, AdamW>) { step(p); }
KERNEL(adamw_bf16, Step<bf16, AdamW>) { step(p); }
KERNEL(adam_l2_f32, Step<float, AdamL2>) { step(p); }
KERNEL(adam_l2_bf16, Step<bf16, AdamL2>) { step(p); }
KERNEL(sgd_momentum_f32, Step<float, SgdMomentum>) { step(p); }
KERNEL(sgd_momentum_bf16, Step<bf16, SgdMomentum>) { step(p); }
KERNEL(sgd_nesterov_f32, Step<float, SgdNesterov>) { step(p); }
KERNEL(sgd_nesterov_bf16, Step<bf16, SgdNesterov>) { step(p); }
KERNEL(sgd_plain, Step<float, SgdPlain>) { step(p); }
KERNEL(lion_f32, Step<float, Lion>) { step(p); }
KERNEL(lion_bf16, Step<bf16, Lion>) { step(p); }
KERNEL(adagrad_f32, Step<float, Adagrad>) { step(p); }
KERNEL(adagrad_bf16, Step<bf16, Adagrad>) { step(p); }
