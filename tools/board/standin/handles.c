/* Open contexts of both kinds by their handles, and the file descriptors that each holds. */
#define _GNU_SOURCE
#include "standin.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { MAX_HANDLES = 4096 };

static struct {
    void *object;
    handle_kind kind;
} open_handles[MAX_HANDLES];
static long n_open;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

uint64_t handle_add(void *object, handle_kind kind) {
    uint64_t handle = 0;
    pthread_mutex_lock(&mutex);
    for (uint64_t i = 0; i < MAX_HANDLES && !handle; i++)
        if (!open_handles[i].object) {
            open_handles[i].object = object;
            open_handles[i].kind = kind;
            handle = i + 1;
            n_open++;
        }
    pthread_mutex_unlock(&mutex);
    return handle;
}

void *handle_find(uint64_t handle, handle_kind kind) {
    void *object = NULL;
    pthread_mutex_lock(&mutex);
    if (handle && handle <= MAX_HANDLES && open_handles[handle - 1].kind == kind)
        object = open_handles[handle - 1].object;
    pthread_mutex_unlock(&mutex);
    return object;
}

void *handle_remove(uint64_t handle, handle_kind kind) {
    void *object = handle_find(handle, kind);
    if (object) {
        pthread_mutex_lock(&mutex);
        open_handles[handle - 1].object = NULL;
        n_open--;
        pthread_mutex_unlock(&mutex);
    }
    return object;
}

long handles_open(void) { return n_open; }

int *descriptors_take(long count) {
    int *taken = malloc((size_t)(count + 1) * sizeof *taken);
    for (long i = 0; i <= count; i++)
        taken[i] = -1;
    for (long i = 0; i < count; i++)
        if ((taken[i] = eventfd(0, EFD_CLOEXEC)) < 0) {
            descriptors_release(taken);
            return NULL;
        }
    return taken;
}

void descriptors_release(int *taken) {
    for (int *at = taken; *at >= 0; at++)
        close(*at);
    free(taken);
}
