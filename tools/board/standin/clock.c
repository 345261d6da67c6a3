/* The clock: a run takes the time of its group, on its own core.
 *
 *     RKNN_STANDIN_CLOCK   FACTOR: a run takes FACTOR times the time in the table. Without it runs take no time.
 *     RKNN_STANDIN_TIMES   the table, a line for each context: GROUP ROWS MICROSECONDS
 *
 * A run holds the cores of its context's mask, so that two contexts on one core queue and three cores run at once.
 * It sleeps, which leaves the CPU to others. Busy time is counted by core.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

enum { MAX_TIMES = 4096, N_CORES = 3, ALL_CORES = 7 };

typedef struct {
    char group[MAX_GROUP];
    uint32_t rows;
    double us;
} entry;

static double factor; /* 0: there is no clock */
static entry *entries;
static size_t n_entries;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t cores[N_CORES] = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER,
                                         PTHREAD_MUTEX_INITIALIZER};
static uint64_t busy_ns[N_CORES]; /* each is written by the holder of its core */

static void refuse(const char *text) {
    fprintf(stderr, "RKNN_STANDIN_CLOCK: %s\n", text);
    exit(2);
}

static void start(void) {
    const char *text = getenv("RKNN_STANDIN_CLOCK"), *path = getenv("RKNN_STANDIN_TIMES");
    if (!text || !*text)
        return;
    factor = strtod(text, NULL);
    FILE *file = path ? fopen(path, "r") : NULL;
    if (factor <= 0 || !file)
        refuse("it is a factor above 0, and RKNN_STANDIN_TIMES names a table");
    entries = calloc(MAX_TIMES, sizeof *entries);
    char line[256];
    while (fgets(line, sizeof line, file)) {
        entry *e = &entries[n_entries];
        if (n_entries == MAX_TIMES || sscanf(line, "%63s %u %lf", e->group, &e->rows, &e->us) != 3)
            refuse("a line of the table is not GROUP ROWS MICROSECONDS, or there are too many");
        n_entries++;
    }
    fclose(file);
}

bool clock_find(const char *group, uint32_t rows, double *us) {
    pthread_once(&once, start);
    *us = 0;
    for (size_t i = 0; i < n_entries; i++)
        if (entries[i].rows == rows && !strcmp(entries[i].group, group)) {
            *us = entries[i].us * factor;
            return true;
        }
    return factor == 0;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

turn clock_begin(double us, int core_mask) {
    turn t = {.us = us, .cores = (unsigned)core_mask & ALL_CORES};
    if (us > 0 && !core_mask) { /* any core: an idle one, if there is one */
        for (unsigned core = 0; core < N_CORES && !t.cores; core++)
            if (!pthread_mutex_trylock(&cores[core]))
                t.cores = 1u << core;
        if (!t.cores) {
            pthread_mutex_lock(&cores[0]);
            t.cores = 1;
        }
    } else if (us > 0)
        for (unsigned core = 0; core < N_CORES; core++)
            if (t.cores & 1u << core)
                pthread_mutex_lock(&cores[core]);
    t.begin_ns = now_ns();
    return t;
}

int64_t clock_end(turn t) {
    uint64_t taken = now_ns() - t.begin_ns, planned = (uint64_t)(1e3 * t.us);
    if (t.us > 0 && taken < planned) {
        taken = planned; /* this thread wakes later than the NPU ends */
        uint64_t end = t.begin_ns + planned;
        struct timespec until = {.tv_sec = (time_t)(end / 1000000000u), .tv_nsec = (long)(end % 1000000000u)};
        prctl(PR_SET_TIMERSLACK, 1000ul); /* of this thread: it wakes within a microsecond, not within 50 */
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL))
            ;
    }
    for (unsigned core = 0; t.us > 0 && core < N_CORES; core++)
        if (t.cores & 1u << core) {
            busy_ns[core] += taken;
            pthread_mutex_unlock(&cores[core]);
        }
    return (int64_t)((taken + 500) / 1000);
}

/* Microseconds that a core was busy with runs that have ended. Rockchip's library has no such function. */
uint64_t standin_busy_us(int core) { return core >= 0 && core < N_CORES ? busy_ns[core] / 1000 : 0; }
