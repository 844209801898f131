// Adds two vectors. The racy variant lets neighbouring blocks write the same element.
template <bool racy>
__device__ void add(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (racy && i % blockDim.x == 0 && i > 0) c[i - 1] = 0.0f;
    if (i < n) c[i] = a[i] + b[i];
}

extern "C" __global__ void vector_add(const float* a, const float* b, float* c, int n) {
    add<false>(a, b, c, n);
}

extern "C" __global__ void vector_add_racy(const float* a, const float* b, float* c, int n) {
    add<true>(a, b, c, n);
}
