// Numbers as kernels see them: loads and stores of 16 bytes, 16-bit floats, the exponential, the logarithm, Philox.
//
// Arithmetic is that of the CPU kernels, operation by operation. A compiler may fuse nothing by itself (--fmad=false):
// where the CPU fuses, the source says fmaf. bf16 and f16 are storage; all arithmetic is float, as sm_75 has none on bf16.
// Results have the CPU's bits but for which NaN a NaN is, and where a GPU's approximations are asked for by name (fast_..).
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
// An entry point. Its only parameter is a structure, so that there is no order of arguments to get wrong.
#define KERNEL(name, ...) \
    extern "C" __global__ void __launch_bounds__(512) name(const __grid_constant__ __VA_ARGS__ p)
// ... that needs many threads to keep memory busy: so many registers that a multiprocessor has room for 1152.
#define BUSY_KERNEL(name, ...) extern "C" __global__ void __maxnreg__(56) name(const __grid_constant__ __VA_ARGS__ p)
// Memory that a block shares: `SHARED(float, sums, [8][32])`, or as much as the launch says.
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#define BUSY_KERNEL KERNEL
#endif

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

__device__ __forceinline__ float widen(float x) {
    return x;
}

__device__ __forceinline__ float widen(bf16 x) {
    return __uint_as_float(u32(x.bits) << 16);
}

__device__ __forceinline__ float widen(f16 x) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    const u32 sign = u32(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // As if the exponent had 8 bits, then its bias put right; so subnormal numbers become normal ones.
    const float scaled = __uint_as_float(rest << 13) * 0x1p112f;
    return __uint_as_float(sign | __float_as_uint(scaled));
#endif
}

// Rounds to nearest, ties to even.
template <class T>
__device__ T round_to(float x);

template <>
__device__ __forceinline__ float round_to<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ bf16 round_to<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bf16{bits};
#else
    const u32 bits = __float_as_uint(x);
    const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return bf16{u16(x != x ? bits >> 16 | 0x40 : rounded)};
#endif
}

template <>
__device__ __forceinline__ f16 round_to<f16>(float x) {
#ifdef __CUDA_ARCH__
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return f16{bits};
#else
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return f16{u16(sign | 0x7e00 | (rest >> 13 & 0x3ff))};
    if (rest >= 0x47800000) return f16{u16(sign | 0x7c00)};
    if (rest < 0x38800000) {
        // Subnormal: adding a half lines the bits up and rounds them.
        const u32 lined_up = __float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000;
        return f16{u16(sign | lined_up)};
    }
    return f16{u16(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
#endif
}

// Two rounded to a word, the first in its low half: one instruction since sm_80, for both types.
template <class T>
__device__ __forceinline__ u32 round_two(float low, float high) {
    return round_to<T>(low).bits | u32(round_to<T>(high).bits) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ u32 round_two<bf16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

template <>
__device__ __forceinline__ u32 round_two<f16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

// Elements of T that fill 16 bytes.
template <class T>
constexpr int VECTOR = 16 / int(sizeof(T));

// Elements that fill 16 bytes of the wider type.
template <class A, class B>
constexpr int VECTOR_OF_WIDER = VECTOR<A> < VECTOR<B> ? VECTOR<A> : VECTOR<B>;

// Whether N elements can be moved at once from here.
template <int N, class T>
__device__ __forceinline__ bool aligned(const T* pointer) {
    return reinterpret_cast<u64>(pointer) % (N * sizeof(T)) == 0;
}

// 16 or 8 bytes of global memory in one instruction. A plain load or store may be taken apart; the intrinsics may not.
template <int BYTES>
struct Words;

template <>
struct Words<16> {
    static __device__ __forceinline__ void load(const void* from, u32 (&words)[4]) {
        const uint4 x = __ldca(static_cast<const uint4*>(from));
        words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
    }
    static __device__ __forceinline__ void store(void* to, const u32 (&words)[4]) {
        __stwb(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    }
};

template <>
struct Words<8> {
    static __device__ __forceinline__ void load(const void* from, u32 (&words)[2]) {
        const uint2 x = __ldca(static_cast<const uint2*>(from));
        words[0] = x.x, words[1] = x.y;
    }
    static __device__ __forceinline__ void store(void* to, const u32 (&words)[2]) {
        __stwb(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
    }
};

template <class T>
struct Packed {
    // Two of 16 bits to a word.
    static __device__ __forceinline__ float get(const u32* words, int k) {
        return widen(T{u16(words[k / 2] >> 16 * (k % 2))});
    }
    template <int N>
    static __device__ __forceinline__ void set(u32* words, const float (&x)[N]) {
        UNROLL
        for (int k = 0; k < N; k += 2) words[k / 2] = round_two<T>(x[k], x[k + 1]);
    }
};

template <>
struct Packed<float> {
    static __device__ __forceinline__ float get(const u32* words, int k) {
        return __uint_as_float(words[k]);
    }
    template <int N>
    static __device__ __forceinline__ void set(u32* words, const float (&x)[N]) {
        UNROLL
        for (int k = 0; k < N; k++) words[k] = __float_as_uint(x[k]);
    }
};

// N elements at `from`; if more than one, aligned to all of them together.
template <class T, int N>
__device__ __forceinline__ void load(const T* from, float (&x)[N]) {
    if constexpr (N == 1) {
        x[0] = widen(*from);
    } else {
        u32 words[N * sizeof(T) / 4];
        Words<N * sizeof(T)>::load(from, words);
        UNROLL
        for (int k = 0; k < N; k++) x[k] = Packed<T>::get(words, k);
    }
}

// Rounds N elements to `to`, aligned likewise.
template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&x)[N]) {
    if constexpr (N == 1) {
        *to = round_to<T>(x[0]);
    } else {
        u32 words[N * sizeof(T) / 4];
        Packed<T>::set(words, x);
        Words<N * sizeof(T)>::store(to, words);
    }
}

// How many elements a call takes, as a type.
template <int N>
struct Lanes {
    static constexpr int COUNT = N;
};

// Calls `each` for all of 0..numel, N elements at a time where `vectors` says that they can be moved so, split among `workers`
// of whom this is number `worker`. The same worker gets the same elements each time.
template <int N, class Index, class Each>
__device__ __forceinline__ void for_each(Index worker, Index workers, Index numel, bool vectors, Each each) {
    const Index whole = vectors ? numel / N : 0;
    for (Index i = worker; i < whole; i += workers) each(Lanes<N>(), i * N);
    for (Index i = whole * N + worker; i < numel; i += workers) each(Lanes<1>(), i);
}

// ... among all threads of the grid.
template <int N, class Each>
__device__ __forceinline__ void for_each_in_grid(u64 numel, bool vectors, Each each) {
    for_each<N, u64>(u64(blockIdx.x) * blockDim.x + threadIdx.x, u64(gridDim.x) * blockDim.x, numel, vectors, each);
}

// ... among the threads of a block.
template <int N, class Each>
__device__ __forceinline__ void for_each_in_block(u64 numel, bool vectors, Each each) {
    for_each<N, u64>(threadIdx.x, blockDim.x, numel, vectors, each);
}

// Which of `count` arrays a piece is of, where `first` is the number of each array's first piece: the last that begins at or before it.
template <class Array>
__device__ __forceinline__ u32 array_of(const Array* arrays, u32 count, u64 piece) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (arrays[middle].first <= piece) low = middle;
        else high = middle;
    }
    return low;
}

// `a` where it is greater (less), else `b`: so `b` where one of them is NaN.
__device__ __forceinline__ float larger(float a, float b) {
    return a > b ? a : b;
}

__device__ __forceinline__ float smaller(float a, float b) {
    return a < b ? a : b;
}

// The larger one that is a number; one instruction on a GPU, where 0 is larger than -0.
__device__ __forceinline__ float larger_number(float a, float b) {
#ifdef __CUDA_ARCH__
    return fmaxf(a, b);
#else
    return larger(a, b);
#endif
}

// e^x as in src/simd/exp.rs, which says why.
__device__ __forceinline__ float exponential(float x) {
    const float rounding = 12582912.0f;  // 1.5 * 2^23
    x = larger(-104.0f, smaller(89.0f, x));
    const float n = fmaf(x, 1.44269504088896340736f, rounding) - rounding;
    x = fmaf(n, -0.693147180559945309417f, x);
    x = fmaf(n, 1.9046542e-9f, x);
    float p = 0.001392625f;
    p = fmaf(p, x, 0.008363233f);
    p = fmaf(p, x, 0.041666552f);
    p = fmaf(p, x, 0.16666576f);
    p = fmaf(p, x, 0.5f);
    p = fmaf(p, x, 1.0f);
    p = fmaf(p, x, 1.0f);
    // By halves: each is a normal number, the first product is exact.
    const int whole = n == n ? int(n) : 0, half = whole >> 1;
    return p * __uint_as_float(u32(half + 127) << 23) * __uint_as_float(u32(whole - half + 127) << 23);
}

// e^x and 1 / x where a GPU's approximations will do: of e^x by 2^-22, and by half a unit in the last place of x / ln 2, which is what
// counts where x is large; of 1 / x by a unit in the last place. Subnormal results are zero. On the host, the exact ones.
__device__ __forceinline__ float fast_exponential(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896340736f));
    return y;
#else
    return exponential(x);
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// ln of a normal positive number, as in src/philox.rs.
__device__ __forceinline__ double logarithm(double x) {
    const u64 bits = __double_as_longlong(x);
    double mantissa = __longlong_as_double((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
    double exponent = double(int(bits >> 52) - 1023);
    if (mantissa > 1.41421356237309504880) {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    const double t = (mantissa - 1.0) / (mantissa + 1.0), t2 = t * t;
    double series = 1.0 / 15.0;
    series = series * t2 + 1.0 / 13.0;
    series = series * t2 + 1.0 / 11.0;
    series = series * t2 + 1.0 / 9.0;
    series = series * t2 + 1.0 / 7.0;
    series = series * t2 + 1.0 / 5.0;
    series = series * t2 + 1.0 / 3.0;
    series = series * t2 + 1.0;
    return exponent * 0.693147180559945309417 + 2.0 * t * series;
}

// Philox4x32-10, as in src/philox.rs.
struct Philox {
    u32 words[4];
};

__device__ __forceinline__ Philox philox(u64 block, const u32 (&name)[2], const u32 (&key)[2]) {
    u32 x0 = u32(block), x1 = u32(block >> 32), x2 = name[0], x3 = name[1], k0 = key[0], k1 = key[1];
    UNROLL
    for (int round = 0; round < 10; round++) {
        const u64 p0 = u64(x0) * 0xd2511f53u, p1 = u64(x2) * 0xcd9e8d57u;
        x0 = u32(p1 >> 32) ^ x1 ^ k0;
        x1 = u32(p1);
        x2 = u32(p0 >> 32) ^ x3 ^ k1;
        x3 = u32(p0);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return Philox{{x0, x1, x2, x3}};
}
