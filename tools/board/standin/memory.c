/* Buffers of the NPU. The NPU sees a copy, which is made when the caller synchronises the buffer. A caller that forgets
 * this computes with the old content. A buffer takes a file descriptor, as on a board. */
#include "standin.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 };

static atomic_long n_buffers;

static void *allocate(size_t size) {
    size_t whole = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *found = aligned_alloc(ALIGNMENT, whole);
    if (found)
        memset(found, 0, whole);
    return found;
}

static void release(memory *m) {
    if (m->descriptors)
        descriptors_release(m->descriptors);
    if (m->device != m->mem.virt_addr)
        free(m->device);
    free(m->widened);
    free(m->mem.virt_addr);
    free(m);
}

rknn_tensor_mem *rknn_create_mem(rknn_context context, uint32_t size) {
    if (!handle_find(context, MATMUL) && !handle_find(context, NETWORK))
        return NULL;
    memory *m = calloc(1, sizeof *m);
    m->descriptors = descriptors_take(1);
    m->mem.virt_addr = allocate(size);
    m->device = computes_nothing() ? m->mem.virt_addr : allocate(size);
    if (!m->descriptors || !m->device || !m->mem.virt_addr || fault("init-memory", "")) {
        complain("failed to allocate %u bytes of NPU memory", size);
        release(m);
        return NULL;
    }
    m->mem.fd = m->descriptors[0];
    m->mem.size = size;
    note("create_mem bytes=%u buffers=%ld", size, atomic_fetch_add(&n_buffers, 1) + 1);
    return &m->mem;
}

int rknn_destroy_mem(rknn_context context, rknn_tensor_mem *mem) {
    (void)context;
    if (!mem)
        return RKNN_ERR_PARAM_INVALID;
    note("destroy_mem bytes=%u buffers=%ld", mem->size, atomic_fetch_sub(&n_buffers, 1) - 1);
    release((memory *)mem);
    return RKNN_SUCC;
}

void memory_sync(memory *m, int mode) {
    if (m->device == m->mem.virt_addr)
        return;
    if (mode & RKNN_MEMORY_SYNC_TO_DEVICE) {
        memcpy(m->device, m->mem.virt_addr, m->mem.size);
        free(m->widened);
        m->widened = NULL;
    }
    if (mode & RKNN_MEMORY_SYNC_FROM_DEVICE)
        memcpy(m->mem.virt_addr, m->device, m->mem.size);
}

int rknn_mem_sync(rknn_context context, rknn_tensor_mem *mem, int mode) {
    (void)context;
    if (!mem || !(mode & (RKNN_MEMORY_SYNC_TO_DEVICE | RKNN_MEMORY_SYNC_FROM_DEVICE)))
        return RKNN_ERR_PARAM_INVALID;
    memory_sync((memory *)mem, mode);
    return RKNN_SUCC;
}
