/* Networks: rknn_init to rknn_destroy. */
#define _GNU_SOURCE
#include "network.h"

#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Programs find the version of the library by this text in its file, as in Rockchip's. */
__attribute__((used)) static const char version[] = "librknnrt version: " STANDIN_API_VERSION;

enum { FILE_VERSION = 6, BUFFERS = 3, HANG_S = 3600 };

static size_t count_elements(const port *ports, uint32_t count) {
    size_t total = 0;
    for (uint32_t i = 0; i < count; i++)
        total += ports[i].elements;
    return total;
}

static void network_free(network *n) {
    if (n->connection >= 0)
        close(n->connection);
    if (n->descriptors)
        descriptors_release(n->descriptors);
    free(n->inputs);
    free(n->outputs);
    free(n);
}

/* Allocates the parts that each context has for itself: all but the model and its weights. */
static int network_allocate(network *n) {
    const char *group = n->model.group;
    n->descriptors = descriptors_take(fault_number("fds", BUFFERS));
    if (!n->descriptors || fault("init-memory", group)) {
        complain("failed to allocate NPU memory for %s", group);
        return RKNN_ERR_MALLOC_FAIL;
    }
    n->n_inputs = count_elements(n->model.inputs, n->model.n_inputs);
    n->n_outputs = count_elements(n->model.outputs, n->model.n_outputs);
    n->inputs = calloc(n->n_inputs, sizeof(float));
    n->outputs = calloc(n->n_outputs, sizeof(float));
    n->connection = remote_open(&n->model);
    return n->connection == REMOTE_FAILED ? RKNN_ERR_FAIL : RKNN_SUCC;
}

static int network_open(network *n, void *bytes, uint32_t size) {
    n->connection = REMOTE_NULL;
    if (!bytes || !model_read(&n->model, bytes, size)) {
        complain("this is not a .rknn file");
        return RKNN_ERR_MODEL_INVALID;
    }
    const char *group = n->model.group;
    uint32_t rows = n->model.outputs[0].dims[0];
    if (n->model.file_version != FILE_VERSION || fault("old-runtime", group)) {
        complain("Invalid RKNN model version %llu", (unsigned long long)n->model.file_version);
        return RKNN_ERR_MODEL_INVALID;
    }
    if (!clock_find(group, rows, &n->us)) {
        complain("the clock has no time for %s at %u rows", group, rows);
        return RKNN_ERR_FAIL;
    }
    n->model_bytes = size;
    return network_allocate(n);
}

static int network_add(network *n, int code, const char *function, rknn_context *context) {
    if (code == RKNN_SUCC && !(*context = handle_add(n, NETWORK)))
        code = RKNN_ERR_MALLOC_FAIL;
    note("%s group=%s context=%llu bytes=%u code=%d open=%ld", function, n->model.group,
         code ? 0ull : (unsigned long long)*context, n->model_bytes, code, handles_open());
    if (code)
        network_free(n);
    return code;
}

int rknn_init(rknn_context *context, void *bytes, uint32_t size, uint32_t flag, void *extend) {
    (void)extend;
    network *n = calloc(1, sizeof *n);
    n->flags = flag;
    return network_add(n, network_open(n, bytes, size), "init", context);
}

/* The same model and weights, with buffers, core mask and bindings of its own. */
int rknn_dup_context(rknn_context *context, rknn_context *duplicate) {
    network *from = handle_find(*context, NETWORK);
    if (!from)
        return RKNN_ERR_CTX_INVALID;
    network *n = calloc(1, sizeof *n);
    n->model = from->model;
    n->model_bytes = from->model_bytes;
    n->flags = from->flags;
    n->us = from->us;
    n->connection = REMOTE_NULL;
    return network_add(n, network_allocate(n), "dup", duplicate);
}

int rknn_destroy(rknn_context context) {
    network *n = handle_remove(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    note("destroy group=%s context=%llu open=%ld", n->model.group, (unsigned long long)context, handles_open());
    network_free(n);
    return RKNN_SUCC;
}

/* -- queries ------------------------------------------------------------------------------------------------ */

static int query_port(const port *ports, uint32_t count, rknn_tensor_attr *attr) {
    if (attr->index >= count)
        return RKNN_ERR_PARAM_INVALID;
    const port *p = &ports[attr->index];
    rknn_tensor_attr found = {.index = attr->index,
                              .n_dims = p->n_dims,
                              .n_elems = p->elements,
                              .size = p->elements * 2,
                              .fmt = RKNN_UNDEFINED,
                              .type = RKNN_FLOAT16,
                              .scale = 1};
    memcpy(found.dims, p->dims, sizeof found.dims);
    memcpy(found.name, p->name, sizeof found.name);
    found.size_with_stride = found.size;
    found.w_stride = p->dims[p->n_dims - 1];
    *attr = found;
    return RKNN_SUCC;
}

static int query_native(const port *ports, uint32_t count, const char *group, rknn_tensor_attr *attr) {
    int code = query_port(ports, count, attr);
    if (code == RKNN_SUCC && in_blocks(&ports[attr->index], group)) {
        const uint32_t dims[] = {1, attr->dims[1] / BLOCK, 1, attr->dims[0], BLOCK};
        memcpy(attr->dims, dims, sizeof dims);
        attr->n_dims = 5;
        attr->fmt = RKNN_NC1HWC2;
    }
    return code;
}

static void query_version(rknn_sdk_version *version, const char *group) {
    bool old = fault("old-version", group);
    snprintf(version->api_version, sizeof version->api_version, "%s",
             old ? STANDIN_OLD_API_VERSION : STANDIN_API_VERSION);
    snprintf(version->drv_version, sizeof version->drv_version, "%s",
             old ? STANDIN_OLD_DRIVER_VERSION : STANDIN_DRIVER_VERSION);
}

static int query(network *n, int command, void *info) {
    const model *m = &n->model;
    switch (command) {
    case RKNN_QUERY_IN_OUT_NUM:
        *(rknn_input_output_num *)info = (rknn_input_output_num){m->n_inputs, m->n_outputs};
        break;
    case RKNN_QUERY_INPUT_ATTR: return query_port(m->inputs, m->n_inputs, info);
    case RKNN_QUERY_OUTPUT_ATTR: return query_port(m->outputs, m->n_outputs, info);
    case RKNN_QUERY_NATIVE_INPUT_ATTR: return query_native(m->inputs, m->n_inputs, m->group, info);
    case RKNN_QUERY_NATIVE_OUTPUT_ATTR: return query_native(m->outputs, m->n_outputs, m->group, info);
    case RKNN_QUERY_PERF_RUN: *(rknn_perf_run *)info = (rknn_perf_run){n->run_us}; break;
    case RKNN_QUERY_SDK_VERSION: query_version(info, m->group); break;
    case RKNN_QUERY_MEM_SIZE:
        *(rknn_mem_size *)info = (rknn_mem_size){
            .total_weight_size = n->model_bytes, .total_internal_size = (uint32_t)(2 * (n->n_inputs + n->n_outputs))};
        break;
    case RKNN_QUERY_CUSTOM_STRING: snprintf(((rknn_custom_string *)info)->string, 1024, "%s", m->identity); break;
    default: return RKNN_ERR_PARAM_INVALID;
    }
    return RKNN_SUCC;
}

int rknn_query(rknn_context context, int command, void *info, uint32_t size) {
    static const uint32_t sizes[] = {[RKNN_QUERY_IN_OUT_NUM] = sizeof(rknn_input_output_num),
                                     [RKNN_QUERY_INPUT_ATTR] = sizeof(rknn_tensor_attr),
                                     [RKNN_QUERY_OUTPUT_ATTR] = sizeof(rknn_tensor_attr),
                                     [RKNN_QUERY_PERF_RUN] = sizeof(rknn_perf_run),
                                     [RKNN_QUERY_NATIVE_INPUT_ATTR] = sizeof(rknn_tensor_attr),
                                     [RKNN_QUERY_NATIVE_OUTPUT_ATTR] = sizeof(rknn_tensor_attr),
                                     [RKNN_QUERY_SDK_VERSION] = sizeof(rknn_sdk_version),
                                     [RKNN_QUERY_MEM_SIZE] = sizeof(rknn_mem_size),
                                     [RKNN_QUERY_CUSTOM_STRING] = sizeof(rknn_custom_string)};
    network *n = handle_find(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    if (!info || command < 0 || (size_t)command >= sizeof sizes / sizeof *sizes || size < sizes[command])
        return RKNN_ERR_PARAM_INVALID;
    return query(n, command, info);
}

int core_mask_check(int core_mask, const char *group) {
    bool known = (core_mask >= 0 && core_mask <= 4) || core_mask == 7 || core_mask == 0xffff;
    bool refused = fault("core-mask", group);
    note("set_core_mask group=%s mask=%d", group, core_mask);
    if (known && !refused)
        return RKNN_SUCC;
    complain("core mask %d is refused", core_mask);
    return RKNN_ERR_PARAM_INVALID;
}

int rknn_set_core_mask(rknn_context context, int core_mask) {
    network *n = handle_find(context, NETWORK);
    int code = n ? core_mask_check(core_mask, n->model.group) : RKNN_ERR_CTX_INVALID;
    if (!code)
        n->core_mask = core_mask;
    return code;
}

/* Shapes are fixed when a graph is compiled: only those can be set. */
int rknn_set_input_shapes(rknn_context context, uint32_t n_inputs, rknn_tensor_attr attr[]) {
    network *n = handle_find(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    for (uint32_t i = 0; i < n_inputs; i++) {
        const rknn_tensor_attr *a = &attr[i];
        if (a->index >= n->model.n_inputs || a->n_dims != n->model.inputs[a->index].n_dims ||
            memcmp(a->dims, n->model.inputs[a->index].dims, a->n_dims * sizeof *a->dims))
            return RKNN_ERR_PARAM_INVALID;
    }
    return RKNN_SUCC;
}

/* -- a call ------------------------------------------------------------------------------------------------- */

int rknn_inputs_set(rknn_context context, uint32_t n_inputs, rknn_input inputs[]) {
    network *n = handle_find(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    size_t bytes = 0;
    for (uint32_t i = 0; i < n_inputs; i++) {
        const rknn_input *in = &inputs[i];
        size_t width = in->type == RKNN_FLOAT32 ? 4 : 2;
        if (in->index >= n->model.n_inputs || !in->buf || (in->type != RKNN_FLOAT32 && in->type != RKNN_FLOAT16))
            return RKNN_ERR_INPUT_INVALID;
        const port *p = &n->model.inputs[in->index];
        if (in->size != p->elements * width) {
            complain("input %s of %s has %u bytes instead of %zu", p->name, n->model.group, in->size,
                     p->elements * width);
            return RKNN_ERR_INPUT_INVALID;
        }
        float *target = n->inputs + count_elements(n->model.inputs, in->index);
        if (in->type == RKNN_FLOAT32)
            memcpy(target, in->buf, in->size);
        else
            halves_to_floats(in->buf, target, p->elements);
        bytes += in->size;
    }
    n->inputs_set = true;
    note("inputs_set group=%s context=%llu rows=%u bytes=%zu", n->model.group, (unsigned long long)context,
         n->model.outputs[0].dims[0], bytes);
    return RKNN_SUCC;
}

/* -- a run -------------------------------------------------------------------------------------------------- */

int run_faults(const char *group) {
    if (fault("killed", group))
        kill(getpid(), SIGKILL);
    if (fault("hang", group))
        sleep((unsigned)fault_number("hang-seconds", HANG_S));
    if (fault("run-fails", group)) {
        complain("failed to submit the task of %s", group);
        return RKNN_ERR_DEVICE_UNAVAILABLE;
    }
    return RKNN_SUCC;
}

static int compute(network *n) {
    const char *group = n->model.group;
    int code = run_faults(group);
    if (code)
        return code;
    bool bound = all_bound(n) && !computes_nothing();
    if (bound)
        read_bound(n);
    if (n->connection >= 0 && !remote_run(n->connection, n->inputs, n->n_inputs, n->outputs, n->n_outputs)) {
        complain("the process that computes %s is gone", group);
        return RKNN_ERR_FAIL;
    }
    if (fault("zeros", group))
        memset(n->outputs, 0, n->n_outputs * sizeof *n->outputs);
    if (fault("nan", group))
        n->outputs[n->n_outputs / 2] = NAN;
    if (bound)
        write_bound(n);
    return RKNN_SUCC;
}

int rknn_run(rknn_context context, void *extend) {
    (void)extend;
    network *n = handle_find(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    const char *group = n->model.group;
    note("run group=%s context=%llu rows=%u", group, (unsigned long long)context, n->model.outputs[0].dims[0]);
    if (!n->inputs_set && !all_bound(n))
        return RKNN_ERR_INPUT_INVALID;
    turn t = clock_begin(n->us, n->core_mask);
    int code = compute(n);
    n->run_us = clock_end(t);
    return code;
}

static int output_get(network *n, rknn_output *out) {
    if (out->index >= n->model.n_outputs)
        return RKNN_ERR_OUTPUT_INVALID;
    const port *p = &n->model.outputs[out->index];
    const float *values = n->outputs + count_elements(n->model.outputs, out->index);
    uint32_t bytes = p->elements * (out->want_float ? 4 : 2);
    if (out->is_prealloc && out->size < bytes)
        return RKNN_ERR_OUTPUT_INVALID;
    if (!out->is_prealloc)
        out->buf = malloc(bytes);
    out->size = bytes;
    if (out->want_float)
        memcpy(out->buf, values, bytes);
    else
        for (uint32_t i = 0; i < p->elements; i++)
            ((uint16_t *)out->buf)[i] = float_to_half(values[i]);
    return RKNN_SUCC;
}

int rknn_outputs_get(rknn_context context, uint32_t n_outputs, rknn_output outputs[], void *extend) {
    (void)extend;
    network *n = handle_find(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    if (n_outputs != n->model.n_outputs) { /* as newer runtimes: all outputs or none */
        complain("%u outputs of %s are asked for, it has %u", n_outputs, n->model.group, n->model.n_outputs);
        return RKNN_ERR_OUTPUT_INVALID;
    }
    size_t bytes = 0;
    for (uint32_t i = 0; i < n_outputs; i++) {
        int code = output_get(n, &outputs[i]);
        if (code)
            return code;
        bytes += outputs[i].size;
    }
    if (fault("wrong-size", n->model.group))
        outputs[0].size /= 2;
    note("outputs_get group=%s context=%llu bytes=%zu", n->model.group, (unsigned long long)context, bytes);
    return RKNN_SUCC;
}

int rknn_outputs_release(rknn_context context, uint32_t n_outputs, rknn_output outputs[]) {
    if (!handle_find(context, NETWORK))
        return RKNN_ERR_CTX_INVALID;
    for (uint32_t i = 0; i < n_outputs; i++)
        if (!outputs[i].is_prealloc) {
            free(outputs[i].buf);
            outputs[i].buf = NULL;
        }
    return RKNN_SUCC;
}
