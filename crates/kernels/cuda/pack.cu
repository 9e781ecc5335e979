// Casts, scaled casts and sums of one or many arrays at once.
//
//     scale        to = from * factor       accumulate   to += from
//
// A segment is an array and the place it goes to: gradients of a layer become one bucket, or are added to it, in one launch.
// Arithmetic is float, rounded once.
#include "numbers.cuh"

constexpr int MAX_SEGMENTS = 64;
// Elements that a block takes at a time.
constexpr u64 PIECE = 4096;

struct Segment {
    const void* from;
    void* to;
    u64 numel;
    // Pieces of the segments before this one.
    u64 first;
};

struct Pack {
    u64 num_pieces;
    u32 num_segments;
    float factor;
    Segment segments[MAX_SEGMENTS];
};

template <class Each>
__device__ __forceinline__ void for_each_piece(const Pack& p, Each each) {
    for (u64 piece = blockIdx.x; piece < p.num_pieces; piece += gridDim.x) {
        const Segment& segment = p.segments[array_of(p.segments, p.num_segments, piece)];
        const u64 start = (piece - segment.first) * PIECE, left = segment.numel - start;
        each(segment, start, left < PIECE ? left : PIECE);
    }
}

template <class From, class To>
__device__ __forceinline__ void scale(const Pack& p) {
    for_each_piece(p, [&](const Segment& segment, u64 start, u64 numel) {
        const From* from = static_cast<const From*>(segment.from) + start;
        To* to = static_cast<To*>(segment.to) + start;
        constexpr int V = VECTOR_OF_WIDER<From, To>;
        for_each_in_block<V>(numel, aligned<V>(from) && aligned<V>(to), [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x[N];
            load(from + at, x);
            UNROLL
            for (int k = 0; k < N; k++) x[k] *= p.factor;
            store(to + at, x);
        });
    });
}

template <class From, class To>
__device__ __forceinline__ void accumulate(const Pack& p) {
    for_each_piece(p, [&](const Segment& segment, u64 start, u64 numel) {
        const From* from = static_cast<const From*>(segment.from) + start;
        To* to = static_cast<To*>(segment.to) + start;
        constexpr int V = VECTOR_OF_WIDER<From, To>;
        for_each_in_block<V>(numel, aligned<V>(from) && aligned<V>(to), [&](auto lanes, u64 at) {
            constexpr int N = decltype(lanes)::COUNT;
            float x[N], sum[N];
            load(from + at, x);
            load(to + at, sum);
            UNROLL
            for (int k = 0; k < N; k++) sum[k] += x[k];
            store(to + at, sum);
        });
    });
}

#define BOTH(from_name, From, to_name, To)                                  \
    KERNEL(scale_##from_name##_to_##to_name, Pack) { scale<From, To>(p); } \
    KERNEL(accumulate_##from_name##_to_##to_name, Pack) { accumulate<From, To>(p); }

BOTH(f32, float, f32, float)
BOTH(f32, float, bf16, bf16)
BOTH(f32, float, f16, f16)
BOTH(bf16, bf16, f32, float)
BOTH(bf16, bf16, bf16, bf16)
BOTH(bf16, bf16, f16, f16)
BOTH(f16, f16, f32, float)
BOTH(f16, f16, bf16, bf16)
BOTH(f16, f16, f16, f16)
