// Sums over ranks, in the order of the ranks and in float, rounded once: src/reduce.rs, bit for bit.
#include "numbers.cuh"

template <class T, class Out>
struct SumRanks {
    // Of each rank `numel` elements, `stride` elements after those of the rank before.
    const T* terms;
    Out* sum;
    u64 stride;
    u64 numel;
    u32 num_terms;
};

// Terms under way together, added in order as they come.
constexpr u32 AHEAD = 4;

template <class T, class Out>
__device__ __forceinline__ void sum_ranks(const SumRanks<T, Out>& p) {
    constexpr int V = VECTOR_OF_WIDER<T, Out>;
    const bool vectors = aligned<V>(p.terms) && aligned<V>(p.sum) && p.stride % V == 0;
    for_each_in_grid<V>(p.numel, vectors, [&](auto lanes, u64 at) {
        constexpr int N = decltype(lanes)::COUNT;
        float sum[N];
        load(p.terms + at, sum);
        u32 rank = 1;
        for (; rank + AHEAD <= p.num_terms; rank += AHEAD) {
            float terms[AHEAD][N];
            UNROLL
            for (u32 i = 0; i < AHEAD; i++) load(p.terms + (rank + i) * p.stride + at, terms[i]);
            UNROLL
            for (u32 i = 0; i < AHEAD; i++) {
                UNROLL
                for (int k = 0; k < N; k++) sum[k] += terms[i][k];
            }
        }
        ROLLED
        for (; rank < p.num_terms; rank++) {
            float term[N];
            load(p.terms + rank * p.stride + at, term);
            UNROLL
            for (int k = 0; k < N; k++) sum[k] += term[k];
        }
        store(p.sum + at, sum);
    });
}

#define SUM_RANKS(from, to, T, Out) \
    KERNEL(sum_ranks_##from##_to_##to, SumRanks<T, Out>) { sum_ranks(p); }

SUM_RANKS(f32, f32, float, float)
SUM_RANKS(bf16, f32, bf16, float)
SUM_RANKS(bf16, bf16, bf16, bf16)
SUM_RANKS(f16, f32, f16, float)
SUM_RANKS(f16, f16, f16, f16)
