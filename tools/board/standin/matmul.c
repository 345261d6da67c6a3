/* The matmul family, computed here: fp16 operands with sums of at least fp32, int8 operands with exact ones. */
#define _GNU_SOURCE
#include "standin.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILE_K = 32, TILE_N = 16, MAX_K = 10240, MAX_SHAPES = 64, C_BLOCK = 4 };

typedef struct {
    rknn_matmul_info info; /* M is that of the shape chosen last */
    rknn_matmul_shape shapes[MAX_SHAPES];
    int n_shapes;
    int *descriptors;
    memory *a, *b, *c;
    char group[MAX_GROUP]; /* MxKxN */
} product;

static bool is_int8(const product *p) { return p->info.type == RKNN_MATMUL_I8_I8_I32; }

/* The position of element (row, column) of a matrix: row-major, or in blocks of `block` columns. */
static size_t place(bool native, size_t rows, size_t columns, size_t block, size_t row, size_t column) {
    if (!native)
        return row * columns + column;
    return (column / block * rows + row) * block + column % block;
}

static size_t place_b(int layout, size_t K, size_t N, size_t block, size_t k, size_t n) {
    switch (layout) {
    case RKNN_LAYOUT_NATIVE:
        return ((n / block * (K / TILE_K) + k / TILE_K) * block + n % block) * TILE_K + k % TILE_K;
    case RKNN_LAYOUT_TRANSPOSED: return n * K + k;
    default: return k * N + n;
    }
}

/* -- shapes ------------------------------------------------------------------------------------------------- */

static void describe(rknn_matmul_tensor_attr *attr, const char *name, int type, size_t width, uint32_t n_dims,
                     const uint32_t *dims) {
    memset(attr, 0, sizeof *attr);
    snprintf(attr->name, sizeof attr->name, "%s", name);
    attr->n_dims = n_dims;
    attr->type = type;
    size_t size = width;
    for (uint32_t i = 0; i < n_dims; i++)
        size *= attr->dims[i] = dims[i];
    attr->size = (uint32_t)size;
}

static void describe_all(const product *p, uint32_t M, rknn_matmul_io_attr *attr) {
    uint32_t K = (uint32_t)p->info.K, N = (uint32_t)p->info.N;
    uint32_t block_a = is_int8(p) ? 16 : 8, block_b = is_int8(p) ? 32 : 16;
    int type = is_int8(p) ? RKNN_INT8 : RKNN_FLOAT16;
    size_t width = is_int8(p) ? 1 : 2;
    bool native = p->info.AC_layout == RKNN_LAYOUT_NATIVE;
    uint32_t a[] = {native ? K / block_a : M, native ? M : K, block_a};
    uint32_t c[] = {native ? N / C_BLOCK : M, native ? M : N, C_BLOCK};
    uint32_t b[4] = {N / block_b, K / TILE_K, block_b, TILE_K};
    bool native_b = p->info.B_layout == RKNN_LAYOUT_NATIVE;
    if (!native_b) {
        b[0] = p->info.B_layout == RKNN_LAYOUT_TRANSPOSED ? N : K;
        b[1] = p->info.B_layout == RKNN_LAYOUT_TRANSPOSED ? K : N;
    }
    describe(&attr->A, "A", type, width, native ? 3 : 2, a);
    describe(&attr->B, "B", type, width, native_b ? 4 : 2, b);
    describe(&attr->C, "C", is_int8(p) ? RKNN_INT32 : RKNN_FLOAT32, 4, native ? 3 : 2, c);
}

static void choose_rows(product *p, int M) {
    p->info.M = M;
    snprintf(p->group, sizeof p->group, "%dx%dx%d", M, p->info.K, p->info.N);
}

static int check(const rknn_matmul_info *info) {
    bool fp16 = info->type == RKNN_MATMUL_F16_F16_F32, int8 = info->type == RKNN_MATMUL_I8_I8_I32;
    if (!fp16 && !int8) {
        complain("matmul type %d is not supported", info->type);
        return RKNN_ERR_PARAM_INVALID;
    }
    if (info->M < 1 || info->K < TILE_K || info->N < 1 || info->K % TILE_K || info->N % (int8 ? 32 : 16) ||
        info->K > MAX_K) {
        complain("matmul shape %dx%dx%d is not aligned, or K is above %d", info->M, info->K, info->N, MAX_K);
        return RKNN_ERR_PARAM_INVALID;
    }
    return RKNN_SUCC;
}

/* -- contexts ----------------------------------------------------------------------------------------------- */

static int product_open(product *p) {
    if (!(p->descriptors = descriptors_take(fault_number("fds", 1))) || fault("init-memory", p->group)) {
        complain("failed to allocate a matmul context");
        return RKNN_ERR_MALLOC_FAIL;
    }
    return RKNN_SUCC;
}

static void product_free(product *p) {
    if (p->descriptors)
        descriptors_release(p->descriptors);
    free(p);
}

static int create(rknn_matmul_ctx *context, const rknn_matmul_info *info, int n_shapes, const rknn_matmul_shape *shapes,
                  rknn_matmul_io_attr *attrs) {
    product *p = calloc(1, sizeof *p);
    int code = RKNN_SUCC;
    p->info = *info;
    p->n_shapes = n_shapes;
    for (int i = 0; i < n_shapes && !code; i++) {
        p->shapes[i] = shapes[i];
        p->info.M = shapes[i].M;
        code = shapes[i].K == info->K && shapes[i].N == info->N ? check(&p->info) : RKNN_ERR_PARAM_INVALID;
        if (!code)
            describe_all(p, (uint32_t)shapes[i].M, &attrs[i]);
    }
    choose_rows(p, shapes[0].M);
    if (!code)
        code = product_open(p);
    if (!code && !(*context = handle_add(p, MATMUL)))
        code = RKNN_ERR_MALLOC_FAIL;
    note("matmul_create group=%s context=%llu shapes=%d code=%d open=%ld", p->group,
         code ? 0ull : (unsigned long long)*context, n_shapes, code, handles_open());
    if (code)
        product_free(p);
    return code;
}

int rknn_matmul_create(rknn_matmul_ctx *context, rknn_matmul_info *info, rknn_matmul_io_attr *attr) {
    rknn_matmul_shape shape = {info->M, info->K, info->N};
    return create(context, info, 1, &shape, attr);
}

int rknn_matmul_create_dynamic_shape(rknn_matmul_ctx *context, rknn_matmul_info *info, int n_shapes,
                                     rknn_matmul_shape shapes[], rknn_matmul_io_attr attrs[]) {
    if (n_shapes < 1 || n_shapes > MAX_SHAPES || fault("no-dynamic", ""))
        return RKNN_ERR_PARAM_INVALID;
    return create(context, info, n_shapes, shapes, attrs);
}

int rknn_matmul_set_dynamic_shape(rknn_matmul_ctx context, rknn_matmul_shape *shape) {
    product *p = handle_find(context, MATMUL);
    if (!p)
        return RKNN_ERR_CTX_INVALID;
    for (int i = 0; i < p->n_shapes; i++)
        if (!memcmp(&p->shapes[i], shape, sizeof *shape)) {
            choose_rows(p, shape->M);
            p->a = p->c = NULL; /* their sizes are those of the other shape */
            return RKNN_SUCC;
        }
    return RKNN_ERR_PARAM_INVALID;
}

int rknn_matmul_set_core_mask(rknn_matmul_ctx context, int core_mask) {
    product *p = handle_find(context, MATMUL);
    return p ? core_mask_check(core_mask, p->group) : RKNN_ERR_CTX_INVALID;
}

int rknn_matmul_set_io_mem(rknn_matmul_ctx context, rknn_tensor_mem *mem, rknn_matmul_tensor_attr *attr) {
    product *p = handle_find(context, MATMUL);
    if (!p)
        return RKNN_ERR_CTX_INVALID;
    rknn_matmul_io_attr known;
    describe_all(p, (uint32_t)p->info.M, &known);
    const rknn_matmul_tensor_attr *expected = *attr->name == 'A' ? &known.A : *attr->name == 'B' ? &known.B : &known.C;
    if (!mem || attr->size != expected->size || mem->size < attr->size ||
        memcmp(attr->dims, expected->dims, sizeof attr->dims)) {
        complain("memory for %s of %s does not fit", attr->name, p->group);
        return RKNN_ERR_PARAM_INVALID;
    }
    *(*attr->name == 'A' ? &p->a : *attr->name == 'B' ? &p->b : &p->c) = (memory *)mem;
    note("matmul_set_io_mem group=%s context=%llu tensor=%s", p->group, (unsigned long long)context, attr->name);
    return RKNN_SUCC;
}

int rknn_matmul_destroy(rknn_matmul_ctx context) {
    product *p = handle_remove(context, MATMUL);
    if (!p)
        return RKNN_ERR_CTX_INVALID;
    note("matmul_destroy context=%llu open=%ld", (unsigned long long)context, handles_open());
    product_free(p);
    return RKNN_SUCC;
}

/* -- a run -------------------------------------------------------------------------------------------------- */

static void widen(const void *stored, bool int8, float *floats, size_t count) {
    if (!int8)
        halves_to_floats(stored, floats, count);
    else
        for (size_t i = 0; i < count; i++)
            floats[i] = ((const int8_t *)stored)[i];
}

/* Many runs use the same B, so it is widened once. */
static const float *widened_b(memory *b, bool int8) {
    size_t count = b->mem.size / (int8 ? 1 : 2);
    if (!b->widened && (b->widened = malloc(count * sizeof *b->widened)))
        widen(b->device, int8, b->widened, count);
    return b->widened;
}

/* A row-major, (M, K), to be freed. */
static float *widened_a(const product *p) {
    size_t M = (size_t)p->info.M, K = (size_t)p->info.K, block = is_int8(p) ? 16 : 8;
    float *stored = malloc(M * K * sizeof *stored), *rows = malloc(M * K * sizeof *rows);
    widen(p->a->device, is_int8(p), stored, M * K);
    for (size_t m = 0; m < M; m++)
        for (size_t k = 0; k < K; k++)
            rows[m * K + k] = stored[place(p->info.AC_layout == RKNN_LAYOUT_NATIVE, M, K, block, m, k)];
    free(stored);
    return rows;
}

static void store(const product *p, size_t m, size_t n, double sum) {
    bool native = p->info.AC_layout == RKNN_LAYOUT_NATIVE;
    size_t at = place(native, (size_t)p->info.M, (size_t)p->info.N, C_BLOCK, m, n);
    if (is_int8(p))
        ((int32_t *)p->c->device)[at] = (int32_t)sum;
    else
        ((float *)p->c->device)[at] = (float)sum;
}

/* The sum over a tile, fp32, is exact for int8. */
static float dot(const float *a, const float *b, size_t step) {
    float sum = 0;
    if (step == 1)
        for (size_t i = 0; i < TILE_K; i++)
            sum += a[i] * b[i];
    else
        for (size_t i = 0; i < TILE_K; i++)
            sum += a[i] * b[i * step];
    return sum;
}

static void multiply(product *p) {
    size_t M = (size_t)p->info.M, K = (size_t)p->info.K, N = (size_t)p->info.N, block = is_int8(p) ? 32 : 16;
    size_t step = p->info.B_layout == RKNN_LAYOUT_NORM ? N : 1; /* from one k to the next, within a tile */
    const float *b = widened_b(p->b, is_int8(p));
    float *a = widened_a(p);
    for (size_t n = 0; n < N; n++)
        for (size_t m = 0; m < M; m++) {
            double sum = 0;
            for (size_t k = 0; k < K; k += TILE_K)
                sum += dot(a + m * K + k, b + place_b(p->info.B_layout, K, N, block, k, n), step);
            store(p, m, n, sum);
        }
    free(a);
}

int rknn_matmul_run(rknn_matmul_ctx context) {
    product *p = handle_find(context, MATMUL);
    if (!p)
        return RKNN_ERR_CTX_INVALID;
    note("matmul_run group=%s context=%llu", p->group, (unsigned long long)context);
    int code = p->a && p->b && p->c ? run_faults(p->group) : RKNN_ERR_INPUT_INVALID;
    if (code)
        return code;
    if (computes_nothing())
        return RKNN_SUCC;
    multiply(p);
    if (fault("zeros", p->group))
        memset(p->c->device, 0, p->c->mem.size);
    if (fault("nan", p->group) && !is_int8(p))
        ((float *)p->c->device)[0] = NAN;
    return RKNN_SUCC;
}

int rknn_B_normal_layout_to_native_layout(void *in, void *out, int K, int N, rknn_matmul_info *info) {
    bool fp16 = info->type == RKNN_MATMUL_F16_F16_F32;
    size_t block = fp16 ? 16 : 32;
    if (K % TILE_K || N % (int)block)
        return RKNN_ERR_PARAM_INVALID;
    for (size_t k = 0; k < (size_t)K; k++)
        for (size_t n = 0; n < (size_t)N; n++) {
            size_t from = k * (size_t)N + n, to = place_b(RKNN_LAYOUT_NATIVE, (size_t)K, (size_t)N, block, k, n);
            if (fp16)
                ((uint16_t *)out)[to] = ((uint16_t *)in)[from];
            else
                ((int8_t *)out)[to] = ((int8_t *)in)[from];
        }
    return RKNN_SUCC;
}
