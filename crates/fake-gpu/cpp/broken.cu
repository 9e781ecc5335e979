// Kernels that are wrong, each in a way that the host has to see.
#include "numbers.cuh"

struct Broken {
    u32* out;
    u64 numel;
};

// Reads what a neighbour wrote, without a barrier between.
KERNEL(broken_race, Broken) {
    SHARED(u32, given, [64]);
    given[threadIdx.x] = threadIdx.x + u32(p.numel);
    p.out[threadIdx.x] = given[(threadIdx.x + 1) % 64];
}

// A barrier that half of the block never comes to.
KERNEL(broken_barrier, Broken) {
    if (threadIdx.x < 32) __syncthreads();
    p.out[threadIdx.x] = 1;
}

// A warp that is not all there when lanes exchange.
KERNEL(broken_shuffle, Broken) {
    if (threadIdx.x % 2 == 0) p.out[threadIdx.x] = __shfl_sync(0xffffffff, threadIdx.x, 0);
}

// One element more than the block asked for.
KERNEL(broken_shared, Broken) {
    DYNAMIC_SHARED(u32, mine);
    mine[p.numel] = 1;
    p.out[threadIdx.x] = mine[0];
}

// 16 bytes where only an element is aligned.
KERNEL(broken_alignment, Broken) {
    const float x[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    store(reinterpret_cast<float*>(p.out) + 1, x);
}
