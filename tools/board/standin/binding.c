/* The caller's memory for inputs and outputs: rknn_set_io_mem. */
#include "network.h"

#include <string.h>

bool in_blocks(const port *p, const char *group) {
    return p->n_dims == 2 && p->dims[1] % BLOCK == 0 && fault("native-blocks", group);
}

static const port *find_port(const port *ports, uint32_t count, const rknn_tensor_attr *attr) {
    bool found = attr->index < count && !strcmp(ports[attr->index].name, attr->name);
    return found ? &ports[attr->index] : NULL;
}

/* Memory for an input or output. pass_through: it is in the native layout. Otherwise it is row-major, fp16 or fp32. */
int rknn_set_io_mem(rknn_context context, rknn_tensor_mem *mem, rknn_tensor_attr *attr) {
    network *n = handle_find(context, NETWORK);
    if (!n)
        return RKNN_ERR_CTX_INVALID;
    model *m = &n->model;
    const port *in = find_port(m->inputs, m->n_inputs, attr), *p = in ? in : find_port(m->outputs, m->n_outputs, attr);
    bool known = attr->type == RKNN_FLOAT16 || (attr->type == RKNN_FLOAT32 && !attr->pass_through);
    if (!p || !mem || !known || mem->size < p->elements * (attr->type == RKNN_FLOAT32 ? 4 : 2) ||
        fault("no-io-memory", m->group)) {
        complain("memory for %s of %s does not fit", attr->name, m->group);
        return RKNN_ERR_PARAM_INVALID;
    }
    bool native = attr->pass_through || attr->fmt == RKNN_NC1HWC2;
    (in ? n->inputs_at : n->outputs_at)[attr->index] = (binding){(memory *)mem, attr->type, native};
    note("set_io_mem group=%s context=%llu port=%s native=%d", m->group, (unsigned long long)context, attr->name,
         native);
    return RKNN_SUCC;
}

bool all_bound(const network *n) {
    for (uint32_t i = 0; i < n->model.n_inputs; i++)
        if (!n->inputs_at[i].memory)
            return false;
    for (uint32_t i = 0; i < n->model.n_outputs; i++)
        if (!n->outputs_at[i].memory)
            return false;
    return true;
}

/* The position of element i of a port in memory. */
static size_t place(const port *p, bool blocks, size_t i) {
    if (!blocks)
        return i;
    size_t row = i / p->dims[1], column = i % p->dims[1];
    return (column / BLOCK * p->dims[0] + row) * BLOCK + column % BLOCK;
}

void read_bound(network *n) {
    float *target = n->inputs;
    for (uint32_t i = 0; i < n->model.n_inputs; target += n->model.inputs[i++].elements) {
        const binding *b = &n->inputs_at[i];
        const port *p = &n->model.inputs[i];
        bool blocks = b->native && in_blocks(p, n->model.group);
        if (!(n->flags & RKNN_FLAG_DISABLE_FLUSH_INPUT_MEM_CACHE))
            memory_sync(b->memory, RKNN_MEMORY_SYNC_TO_DEVICE);
        for (size_t j = 0; j < p->elements; j++) {
            size_t at = place(p, blocks, j);
            target[j] = b->type == RKNN_FLOAT32 ? ((float *)b->memory->device)[at]
                                                : half_to_float(((uint16_t *)b->memory->device)[at]);
        }
    }
}

void write_bound(network *n) {
    const float *source = n->outputs;
    for (uint32_t i = 0; i < n->model.n_outputs; source += n->model.outputs[i++].elements) {
        const binding *b = &n->outputs_at[i];
        const port *p = &n->model.outputs[i];
        bool blocks = b->native && in_blocks(p, n->model.group);
        for (size_t j = 0; j < p->elements; j++) {
            size_t at = place(p, blocks, j);
            if (b->type == RKNN_FLOAT32)
                ((float *)b->memory->device)[at] = source[j];
            else
                ((uint16_t *)b->memory->device)[at] = float_to_half(source[j]);
        }
        if (!(n->flags & RKNN_FLAG_DISABLE_FLUSH_OUTPUT_MEM_CACHE))
            memory_sync(b->memory, RKNN_MEMORY_SYNC_FROM_DEVICE);
    }
}
