// GELU, by its tanh form, of what a linear map has made and the map's bias, as in src/gelu.rs, which has the formulas.
//
//     forward     out = gelu(x + bias)
//     backward    dx = dy gelu'(x + bias), and of each column the sum of dx over the block's rows: parts of the bias' gradient
//
// A warp takes 512 bytes of a row: a thread has the same columns in all its rows, their biases and sums in registers. The warps of a
// block take rows in turn. The exponential and the division are a GPU's approximations, the CPU's on the host.
#include "numbers.cuh"
#include "reduce.cuh"

template <class T>
struct GeluForward {
    const T* x;
    const T* bias;
    T* out;
    u64 rows;
    u64 width;
};

template <class T>
struct GeluBackward {
    const T* x;
    const T* bias;
    const T* dy;
    T* dx;
    // [splits of the rows, width]
    float* partial_dbias;
    u64 rows;
    u64 width;
};

constexpr u32 TURNS = 8;

// What a block has: some columns, and the rows from `first_row` on, `row_step` apart for each warp.
template <int V>
struct Tile {
    u64 first_column;
    u64 split;
    u64 first_row;
    u64 row_step;
    u64 width;
    bool vectors;

    __device__ __forceinline__ Tile(u64 width, bool vectors) : width(width), vectors(vectors) {
        const u32 tiles = width == 0 ? 1 : u32((width + WARP * V - 1) / (WARP * V));
        first_column = u64(blockIdx.x % tiles) * (WARP * V);
        split = blockIdx.x / tiles;
        first_row = split * TURNS + threadIdx.x / WARP;
        row_step = u64(gridDim.x / tiles) * TURNS;
    }

    // The column number `k` of lane `lane`.
    __device__ __forceinline__ u64 column(u32 lane, int k) const {
        return first_column + (vectors ? lane * V + k : k * WARP + lane);
    }

    // Calls `each` for all columns of this thread together, or for the `k`th alone.
    template <class Each>
    __device__ __forceinline__ void for_each_column(Each each) const {
        const u32 lane = threadIdx.x % WARP;
        if (vectors) {
            if (column(lane, 0) < width) each(Lanes<V>(), 0, column(lane, 0));
            return;
        }
        UNROLL
        for (int k = 0; k < V; k++) {
            if (column(lane, k) < width) each(Lanes<1>(), k, column(lane, k));
        }
    }
};

// gelu(x) = x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float TWICE_SQRT_2_PI = 1.59576912160573081145f, OF_CUBE = 0.0713548162726002493940f;

__device__ __forceinline__ float sigmoid_of_2u(float x, float x2) {
    return fast_reciprocal(1.0f + fast_exponential(x * fmaf(-OF_CUBE, x2, -TWICE_SQRT_2_PI)));
}

template <class T>
__device__ __forceinline__ void forward(const GeluForward<T>& p) {
    constexpr int V = VECTOR<T>;
    const Tile<V> tile(p.width, p.width % V == 0 && aligned<V>(p.x) && aligned<V>(p.bias) && aligned<V>(p.out));
    tile.for_each_column([&](auto lanes, int, u64 column) {
        constexpr int N = decltype(lanes)::COUNT;
        float bias[N];
        load(p.bias + column, bias);
        for (u64 row = tile.first_row; row < p.rows; row += tile.row_step) {
            float x[N];
            load(p.x + row * p.width + column, x);
            UNROLL
            for (int k = 0; k < N; k++) {
                x[k] += bias[k];
                x[k] *= sigmoid_of_2u(x[k], x[k] * x[k]);
            }
            store(p.out + row * p.width + column, x);
        }
    });
}

template <class T>
__device__ __forceinline__ void backward(const GeluBackward<T>& p) {
    constexpr int V = VECTOR<T>;
    SHARED(float, shared_sums, [TURNS][V][WARP]);
    const Tile<V> tile(p.width, p.width % V == 0 && aligned<V>(p.x) && aligned<V>(p.bias) && aligned<V>(p.dy) &&
                                    aligned<V>(p.dx));
    float sums[V] = {};
    tile.for_each_column([&](auto lanes, int first, u64 column) {
        constexpr int N = decltype(lanes)::COUNT;
        float bias[N];
        load(p.bias + column, bias);
        for (u64 row = tile.first_row; row < p.rows; row += tile.row_step) {
            float x[N], dy[N];
            load(p.x + row * p.width + column, x);
            load(p.dy + row * p.width + column, dy);
            UNROLL
            for (int k = 0; k < N; k++) {
                x[k] += bias[k];
                const float x2 = x[k] * x[k], s = sigmoid_of_2u(x[k], x2);
                // gelu' = sigmoid + x * sigmoid * (1 - sigmoid) * (2 u)'
                const float slope = fmaf(x[k] * s * (1.0f - s), fmaf(3.0f * OF_CUBE, x2, TWICE_SQRT_2_PI), s);
                dy[k] *= slope;
                sums[first + k] += dy[k];
            }
            store(p.dx + row * p.width + column, dy);
        }
    });
    const u32 turn = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    UNROLL
    for (int k = 0; k < V; k++) shared_sums[turn][k][lane] = sums[k];
    __syncthreads();
    // Now a warp has the `turn`th columns: the warps' sums of them, in order.
    if (turn >= V || tile.column(lane, turn) >= p.width) return;
    float total = 0.0f;
    UNROLL
    for (u32 i = 0; i < TURNS; i++) total += shared_sums[i][turn][lane];
    p.partial_dbias[tile.split * p.width + tile.column(lane, turn)] = total;
}

KERNEL(gelu_forward_f32, GeluForward<float>) { forward(p); }
KERNEL(gelu_forward_bf16, GeluForward<bf16>) { forward(p); }
KERNEL(gelu_forward_f16, GeluForward<f16>) { forward(p); }
KERNEL(gelu_backward_f32, GeluBackward<float>) { backward(p); }
KERNEL(gelu_backward_bf16, GeluBackward<bf16>) { backward(p); }
KERNEL(gelu_backward_f16, GeluBackward<f16>) { backward(p); }
