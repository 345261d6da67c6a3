/* The part of librknnrt's interface that this project calls: declarations of our own.
 *
 * Layouts are those of runtime 2.x, equal on aarch64 and x86-64. tests/test_abi.py compares every size and offset
 * with the ctypes structures in rwkv_npu/backends/rknn_api.py.
 */
#ifndef RKNN_API_H
#define RKNN_API_H

#include <stdint.h>

typedef uint64_t rknn_context;
typedef rknn_context rknn_matmul_ctx;

enum { RKNN_MAX_DIMS = 16, RKNN_MAX_NAME = 256 };

enum {
    RKNN_SUCC = 0,
    RKNN_ERR_FAIL = -1,
    RKNN_ERR_TIMEOUT = -2,
    RKNN_ERR_DEVICE_UNAVAILABLE = -3,
    RKNN_ERR_MALLOC_FAIL = -4,
    RKNN_ERR_PARAM_INVALID = -5,
    RKNN_ERR_MODEL_INVALID = -6,
    RKNN_ERR_CTX_INVALID = -7,
    RKNN_ERR_INPUT_INVALID = -8,
    RKNN_ERR_OUTPUT_INVALID = -9,
};

/* Flags of rknn_init: the caller flushes the caches of bound memory, by rknn_mem_sync. */
enum { RKNN_FLAG_DISABLE_FLUSH_INPUT_MEM_CACHE = 0x4000, RKNN_FLAG_DISABLE_FLUSH_OUTPUT_MEM_CACHE = 0x8000 };

enum { RKNN_MEMORY_SYNC_TO_DEVICE = 1, RKNN_MEMORY_SYNC_FROM_DEVICE = 2 };

enum { RKNN_QUERY_IN_OUT_NUM = 0, RKNN_QUERY_INPUT_ATTR = 1, RKNN_QUERY_OUTPUT_ATTR = 2,
       RKNN_QUERY_PERF_RUN = 4, RKNN_QUERY_SDK_VERSION = 5, RKNN_QUERY_MEM_SIZE = 6, RKNN_QUERY_CUSTOM_STRING = 7,
       RKNN_QUERY_NATIVE_INPUT_ATTR = 8, RKNN_QUERY_NATIVE_OUTPUT_ATTR = 9 };

enum { RKNN_FLOAT32 = 0, RKNN_FLOAT16 = 1, RKNN_INT8 = 2, RKNN_INT32 = 6 };

enum { RKNN_NCHW = 0, RKNN_NHWC = 1, RKNN_NC1HWC2 = 2, RKNN_UNDEFINED = 3 };

typedef struct {
    uint32_t n_input, n_output;
} rknn_input_output_num;

typedef struct {
    uint32_t index;
    uint32_t n_dims;
    uint32_t dims[RKNN_MAX_DIMS];
    char name[RKNN_MAX_NAME];
    uint32_t n_elems;
    uint32_t size;
    int32_t fmt;
    int32_t type;
    int32_t qnt_type;
    int8_t fl;
    int32_t zp;
    float scale;
    uint32_t w_stride;
    uint32_t size_with_stride;
    uint8_t pass_through;
    uint32_t h_stride;
} rknn_tensor_attr;

typedef struct {
    int64_t run_duration; /* microseconds of the last run */
} rknn_perf_run;

typedef struct {
    char api_version[256];
    char drv_version[256];
} rknn_sdk_version;

typedef struct {
    uint32_t total_weight_size;
    uint32_t total_internal_size;
    uint64_t total_dma_allocated_size;
    uint32_t total_sram_size;
    uint32_t free_sram_size;
    uint32_t reserved[10];
} rknn_mem_size;

typedef struct {
    char string[1024];
} rknn_custom_string;

typedef struct {
    uint32_t index;
    void *buf;
    uint32_t size;
    uint8_t pass_through;
    int32_t type;
    int32_t fmt;
} rknn_input;

typedef struct {
    uint8_t want_float;
    uint8_t is_prealloc;
    uint32_t index;
    void *buf;
    uint32_t size;
} rknn_output;

typedef struct {
    void *virt_addr;
    uint64_t phys_addr;
    int32_t fd;
    int32_t offset;
    uint32_t size;
    uint32_t flags;
    void *priv_data;
} rknn_tensor_mem;

int rknn_init(rknn_context *context, void *model, uint32_t size, uint32_t flag, void *extend);
int rknn_dup_context(rknn_context *context, rknn_context *duplicate);
int rknn_destroy(rknn_context context);
int rknn_query(rknn_context context, int command, void *info, uint32_t size);
int rknn_set_core_mask(rknn_context context, int core_mask);
int rknn_set_input_shapes(rknn_context context, uint32_t n_inputs, rknn_tensor_attr attr[]);
int rknn_inputs_set(rknn_context context, uint32_t n_inputs, rknn_input inputs[]);
int rknn_run(rknn_context context, void *extend);
int rknn_outputs_get(rknn_context context, uint32_t n_outputs, rknn_output outputs[], void *extend);
int rknn_outputs_release(rknn_context context, uint32_t n_outputs, rknn_output outputs[]);

rknn_tensor_mem *rknn_create_mem(rknn_context context, uint32_t size);
int rknn_destroy_mem(rknn_context context, rknn_tensor_mem *mem);
int rknn_mem_sync(rknn_context context, rknn_tensor_mem *mem, int mode);
int rknn_set_io_mem(rknn_context context, rknn_tensor_mem *mem, rknn_tensor_attr *attr);

/* -- the matmul family: C (M, N) = A (M, K) B (K, N) ---------------------------------------------------------- */

enum { RKNN_MATMUL_F16_F16_F32 = 1, RKNN_MATMUL_I8_I8_I32 = 2 };

/* norm: row-major. native: B (N/n, K/32, n, 32), n = 16 in fp16 and 32 in int8; A (K/k, M, k), k = 8 and 16;
 * C (N/4, M, 4). transposed: B as (N, K). */
enum { RKNN_LAYOUT_NORM = 0, RKNN_LAYOUT_NATIVE = 1, RKNN_LAYOUT_TRANSPOSED = 2 };

typedef struct {
    int32_t M, K, N;
    int32_t type;
    int16_t B_layout;
    int16_t B_quant_type;
    int16_t AC_layout;
    int16_t AC_quant_type;
    int32_t iommu_domain_id;
    int16_t group_size;
    int8_t reserved[34];
} rknn_matmul_info;

typedef struct {
    char name[RKNN_MAX_NAME];
    uint32_t n_dims;
    uint32_t dims[RKNN_MAX_DIMS];
    uint32_t size;
    int32_t type;
} rknn_matmul_tensor_attr;

typedef struct {
    rknn_matmul_tensor_attr A, B, C;
} rknn_matmul_io_attr;

typedef struct {
    int32_t M, K, N;
} rknn_matmul_shape;

int rknn_matmul_create(rknn_matmul_ctx *context, rknn_matmul_info *info, rknn_matmul_io_attr *attr);
int rknn_matmul_create_dynamic_shape(rknn_matmul_ctx *context, rknn_matmul_info *info, int n_shapes,
                                     rknn_matmul_shape shapes[], rknn_matmul_io_attr attrs[]);
int rknn_matmul_set_dynamic_shape(rknn_matmul_ctx context, rknn_matmul_shape *shape);
int rknn_matmul_set_io_mem(rknn_matmul_ctx context, rknn_tensor_mem *mem, rknn_matmul_tensor_attr *attr);
int rknn_matmul_set_core_mask(rknn_matmul_ctx context, int core_mask);
int rknn_matmul_run(rknn_matmul_ctx context);
int rknn_matmul_destroy(rknn_matmul_ctx context);
int rknn_B_normal_layout_to_native_layout(void *in, void *out, int K, int N, rknn_matmul_info *info);

#endif
