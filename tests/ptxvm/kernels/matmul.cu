// c = a * b for n x n matrices, by tiles in shared memory. The racy variant omits the barrier
// that keeps a tile until everybody has used it.
constexpr int TILE = 16;

template <bool racy>
__device__ void matmul(const float* a, const float* b, float* c, int n) {
    __shared__ float tile_a[TILE][TILE];
    __shared__ float tile_b[TILE][TILE];
    int x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    int tiles = n / TILE;
    int row = blockIdx.x / tiles * TILE + y, col = blockIdx.x % tiles * TILE + x;
    float sum = 0.0f;
    for (int t = 0; t < tiles; t++) {
        tile_a[y][x] = a[row * n + t * TILE + x];
        tile_b[y][x] = b[(t * TILE + y) * n + col];
        __syncthreads();
        for (int k = 0; k < TILE; k++) sum += tile_a[y][k] * tile_b[k][x];
        if (!racy) __syncthreads();
    }
    c[row * n + col] = sum;
}

extern "C" __global__ void matmul_shared(const float* a, const float* b, float* c, int n) {
    matmul<false>(a, b, c, n);
}

extern "C" __global__ void matmul_shared_racy(const float* a, const float* b, float* c, int n) {
    matmul<true>(a, b, c, n);
}
