/* A context of a network, and the memory that is bound to its ports. */
#ifndef NETWORK_H
#define NETWORK_H

#include "standin.h"

enum { BLOCK = 8 }; /* columns of a block of the native layout, where that is in blocks */

/* Memory that is bound to a port, and how its elements lie there. */
typedef struct {
    memory *memory;
    int type;
    bool native; /* in the layout of the native attributes: the runtime converts nothing */
} binding;

typedef struct {
    model model;
    uint32_t model_bytes, flags;
    binding inputs_at[MAX_PORTS], outputs_at[MAX_PORTS];
    int connection;
    int *descriptors;
    float *inputs, *outputs; /* all of them, side by side */
    size_t n_inputs, n_outputs;
    bool inputs_set;
    int core_mask;
    double us;      /* of a run, by the clock */
    int64_t run_us; /* of the last run */
} network;

/* True if the native layout of a port is in blocks, as that of 4-D tensors; false if it is row-major. */
bool in_blocks(const port *p, const char *group);

/* True if every input and output has memory. */
bool all_bound(const network *n);

/* The inputs from bound memory, and the outputs to it. Without the flags of rknn_init caches are flushed here. */
void read_bound(network *n);
void write_bound(network *n);

#endif
