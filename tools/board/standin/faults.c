/* Faults on request, and the log of calls.
 *
 *     RKNN_STANDIN_FAULTS   FAULT[,FAULT...], each NAME[@N | @N+ | /N][:GROUP]
 *                           at the N-th call, from the N-th on, at every N-th; always without any of these.
 *                           With :GROUP calls of contexts of that group alone count and fail.
 *                           NAME=NUMBER sets a quantity.
 *     RKNN_STANDIN_LOG      a file to which a line is added for every call
 *
 * The names are listed in ../__init__.py.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FAULTS = 32 };

typedef struct {
    char name[32], group[MAX_GROUP];
    long n, calls;
    char when; /* '@' at, '+' from, '/' every, 0 always, '=' a quantity */
} request;

static request requests[MAX_FAULTS];
static size_t n_requests;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int log_file = -1;

static void refuse(const char *text) {
    fprintf(stderr, "RKNN_STANDIN_FAULTS: %s is not NAME[@N|@N+|/N|=N][:GROUP]\n", text);
    exit(2);
}

static void parse(const char *text) {
    request *r = &requests[n_requests++];
    size_t length = strcspn(text, "@/=:");
    if (!length || length >= sizeof r->name || n_requests == MAX_FAULTS)
        refuse(text);
    memcpy(r->name, text, length);
    char *at = (char *)text + length;
    if (*at && *at != ':') {
        r->when = *at;
        r->n = strtol(at + 1, &at, 10);
        if (r->when == '@' && *at == '+') {
            r->when = '+';
            at++;
        }
        if (r->n < 1)
            refuse(text);
    }
    if (*at == ':')
        snprintf(r->group, sizeof r->group, "%s", at + 1);
    else if (*at)
        refuse(text);
}

static void start(void) {
    const char *faults = getenv("RKNN_STANDIN_FAULTS"), *log = getenv("RKNN_STANDIN_LOG");
    if (faults && *faults) {
        char *copy = strdup(faults), *rest = copy;
        for (char *one; (one = strsep(&rest, ","));)
            parse(one);
        free(copy);
    }
    if (log && *log && (log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) < 0)
        fprintf(stderr, "RKNN_STANDIN_LOG: cannot write %s\n", log);
}

static bool happens(request *r) {
    r->calls++;
    switch (r->when) {
    case '@': return r->calls == r->n;
    case '+': return r->calls >= r->n;
    case '/': return r->calls % r->n == 0;
    default: return r->when == 0;
    }
}

bool fault(const char *name, const char *group) {
    pthread_once(&once, start);
    bool found = false;
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; i < n_requests; i++) {
        request *r = &requests[i];
        if (!strcmp(r->name, name) && (!*r->group || !strcmp(r->group, group)))
            found |= happens(r);
    }
    pthread_mutex_unlock(&mutex);
    if (found)
        note("fault name=%s group=%s", name, group);
    return found;
}

long fault_number(const char *name, long otherwise) {
    pthread_once(&once, start);
    for (size_t i = 0; i < n_requests; i++)
        if (requests[i].when == '=' && !strcmp(requests[i].name, name))
            return requests[i].n;
    return otherwise;
}

void note(const char *format, ...) {
    pthread_once(&once, start);
    if (log_file < 0)
        return;
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 32, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 33)
        length = sizeof line - 33;
    length += snprintf(line + length, 32, " pid=%d\n", (int)getpid());
    if (write(log_file, line, (size_t)length) < 0) /* such as a full disk: the log ends here */
        log_file = -1;
}

void complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("E RKNN (stand-in): ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}
