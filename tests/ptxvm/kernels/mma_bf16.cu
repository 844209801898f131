// d = a * b for one 16x8 tile with bf16 tensor-core products: a is 16 x k row-major, b is 8 x k
// (column-major k x 8), staged by cp.async. The racy variant reads before the copies are awaited.
template <bool racy>
__device__ void tile(const unsigned short* a, const unsigned short* b, float* d, int k) {
    __shared__ alignas(16) unsigned short sa[16 * 16];
    __shared__ alignas(16) unsigned short sb[8 * 16];
    int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k0 = 0; k0 < k; k0 += 16) {
        unsigned to_a = __cvta_generic_to_shared(sa + lane * 8);
        const void* from_a = a + lane / 2 * k + k0 + lane % 2 * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_a),
                     "l"(__cvta_generic_to_global(from_a)) : "memory");
        if (lane < 16) {
            unsigned to_b = __cvta_generic_to_shared(sb + lane * 8);
            const void* from_b = b + lane / 2 * k + k0 + lane % 2 * 8;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_b),
                         "l"(__cvta_generic_to_global(from_b)) : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (!racy) asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncwarp();
        unsigned fa[4], fb[2];
        unsigned rows = __cvta_generic_to_shared(sa + lane % 16 * 16 + lane / 16 * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(rows) : "memory");
        fb[0] = *(const unsigned*)(sb + group * 16 + pair * 2);
        fb[1] = *(const unsigned*)(sb + group * 16 + pair * 2 + 8);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
        __syncwarp();
    }
    d[group * 8 + pair * 2] = acc[0];
    d[group * 8 + pair * 2 + 1] = acc[1];
    d[(group + 8) * 8 + pair * 2] = acc[2];
    d[(group + 8) * 8 + pair * 2 + 1] = acc[3];
}

extern "C" __global__ void mma_bf16(const unsigned short* a, const unsigned short* b, float* d,
                                    int k) {
    tile<false>(a, b, d, k);
}

extern "C" __global__ void mma_bf16_racy(const unsigned short* a, const unsigned short* b,
                                         float* d, int k) {
    tile<true>(a, b, d, k);
}
