/* Inside the stand-in: what its files share. README in ../__init__.py. */
#ifndef STANDIN_H
#define STANDIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "rknn_api.h"

#define STANDIN_API_VERSION "2.5.0 (stand-in of rwkv_npu: no NPU computes)"
#define STANDIN_DRIVER_VERSION "0.9.8 (stand-in of rwkv_npu: there is no driver)"
#define STANDIN_OLD_API_VERSION "1.5.2 (stand-in of rwkv_npu, as an old runtime)"
#define STANDIN_OLD_DRIVER_VERSION "0.8.2 (stand-in of rwkv_npu, as an old driver)"

enum { MAX_PORTS = 64, MAX_IDENTITY = 1024, MAX_GROUP = 64 };

/* -- model.c: what a .rknn file says ------------------------------------------------------------------------ */

typedef struct {
    char name[RKNN_MAX_NAME];
    uint32_t n_dims, dims[RKNN_MAX_DIMS];
    uint32_t elements;
} port;

typedef struct {
    uint64_t file_version;
    uint32_t n_inputs, n_outputs;
    port inputs[MAX_PORTS], outputs[MAX_PORTS];
    char identity[MAX_IDENTITY]; /* the custom string, JSON; empty if there is none */
    char group[MAX_GROUP];       /* its "group" */
} model;

/* Reads `size` bytes of a .rknn file; false if that is not one. */
bool model_read(model *found, const uint8_t *bytes, size_t size);

/* -- faults.c: faults on request, and the log of calls ------------------------------------------------------- */

/* True if the fault `name` happens at this call of a context of `group`. Counts the call. */
bool fault(const char *name, const char *group);

/* The number in `name=NUMBER` among the faults, or `otherwise`. */
long fault_number(const char *name, long otherwise);

/* A line in the log of calls: what was called, then key=value pairs. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* An error as the library prints it, on stderr. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* -- remote.c: the process that computes -------------------------------------------------------------------- */

enum { REMOTE_NULL = -1, REMOTE_FAILED = -2 };

/* True if RKNN_STANDIN_NULL is 1: every run returns at once. */
bool computes_nothing(void);

/* A connection for the contexts of `m`; REMOTE_NULL if nothing is computed, REMOTE_FAILED after an error. */
int remote_open(const model *m);

/* Sends fp32 inputs, side by side, and receives the outputs. */
bool remote_run(int connection, const float *inputs, size_t n_inputs, float *outputs, size_t n_outputs);

/* -- handles.c ---------------------------------------------------------------------------------------------- */

typedef enum { NETWORK = 1, MATMUL = 2 } handle_kind;

/* A number for an open object; 0 when there are too many. */
uint64_t handle_add(void *object, handle_kind kind);

/* The object of a number, or NULL. */
void *handle_find(uint64_t handle, handle_kind kind);
void *handle_remove(uint64_t handle, handle_kind kind);
long handles_open(void);

/* Takes `count` file descriptors, as buffers of the NPU do; NULL, and none taken, when they run out. */
int *descriptors_take(long count);
void descriptors_release(int *taken);

/* -- memory.c ----------------------------------------------------------------------------------------------- */

typedef struct {
    rknn_tensor_mem mem; /* must be first: the caller sees only this part */
    void *device;        /* what the NPU sees */
    float *widened;      /* a B in fp16 as fp32, for its next products; NULL after it changed */
    int *descriptors;
} memory;

void memory_sync(memory *m, int mode);

/* -- context.c ---------------------------------------------------------------------------------------------- */

/* RKNN_SUCC if the mask names cores that exist. */
int core_mask_check(int core_mask, const char *group);

/* Applies the faults of a run. Returns its error code, or RKNN_SUCC. */
int run_faults(const char *group);

/* -- clock.c ------------------------------------------------------------------------------------------------ */

typedef struct {
    double us;
    unsigned cores; /* bits of the cores that are held */
    uint64_t begin_ns;
} turn;

/* The microseconds of a run, 0 without a clock. False if there is a clock and its table lacks them. */
bool clock_find(const char *group, uint32_t rows, double *us);

/* Waits for the cores of a mask (0: an idle one), and holds them. */
turn clock_begin(double us, int core_mask);

/* Sleeps until the turn's microseconds are over, and releases the cores. Returns the microseconds that it took. */
int64_t clock_end(turn t);

/* -- half.c ------------------------------------------------------------------------------------------------- */

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);
void halves_to_floats(const uint16_t *halves, float *floats, size_t count);

#endif
