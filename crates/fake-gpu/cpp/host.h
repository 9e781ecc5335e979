// Enough of CUDA's vocabulary to compile the kernels as C++ and run them on the host: included before each source.
//
// A block's threads are fibers of one thread of the host, run in turn; a barrier hands over to the next. host.cpp has the
// scheduler.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define UNROLL
#define ROLLED
#define SHARED(type, name, ...)         \
    typedef type name##_array __VA_ARGS__; \
    name##_array& name = *static_cast<name##_array*>(host::shared(__LINE__, sizeof(name##_array)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(host::dynamic_shared())

// For each kernel `name`: `host_name`, which takes the address of the parameter, and `host_name_bytes`, its size.
#define KERNEL(name, ...)                                                                                      \
    static void name(const __VA_ARGS__& p);                                                                    \
    extern "C" void host_##name(const void* p) { name(*static_cast<const __VA_ARGS__*>(p)); }                  \
    extern "C" unsigned long host_##name##_bytes() { return sizeof(__VA_ARGS__); }                             \
    static void name(const __VA_ARGS__& p)

struct Dim {
    unsigned x;
};
extern thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return uint2{x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return uint4{x, y, z, w};
}

namespace host {
void* dynamic_shared();
void* shared(int line, unsigned bytes);
void block_barrier();
// Gives `bytes` from each lane of the warp to the others: this lane gets those of `lane`.
void exchange(const void* give, void* take, int bytes, int lane);
// A kernel did what a device would not do.
[[noreturn]] void fault(const char* what);
}  // namespace host

// A device faults at an address that is not aligned to all that is moved at once.
template <class T>
inline void __stwb(T* to, T x) {
    if (reinterpret_cast<std::uintptr_t>(to) % sizeof(T) != 0) host::fault("a store is not aligned");
    *to = x;
}

template <class T>
inline T __ldca(const T* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T) != 0) host::fault("a load is not aligned");
    return *from;
}

inline void __syncthreads() {
    host::block_barrier();
}

template <class T>
inline T __shfl_sync(unsigned, T x, int lane) {
    T taken;
    host::exchange(&x, &taken, sizeof(T), lane % 32);
    return taken;
}

// Lanes beyond the warp's end give the lane its own number.
template <class T>
inline T __shfl_down_sync(unsigned, T x, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return __shfl_sync(0, x, lane + distance < 32 ? lane + distance : lane);
}

template <class To, class From>
inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) {
    return bits_of<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
    return bits_of<float>(x);
}
inline long long __double_as_longlong(double x) {
    return bits_of<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return bits_of<double>(x);
}

inline unsigned long long atomicMin(unsigned long long* at, unsigned long long x) {
    const unsigned long long old = *at;
    if (x < old) *at = x;
    return old;
}
