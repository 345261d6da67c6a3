/* The process on the host that computes: a local socket at RKNN_STANDIN_SOCKET, one connection a context.
 *
 * With RKNN_STANDIN_NULL=1 nothing is computed: every run returns at once, and outputs stay as they were.
 * Messages are numbers of the machine: u32 count, then as many bytes of text (opening) or fp32 numbers (running).
 * Opening sends the identity and the names of inputs and outputs, a line each; the answer is an i32, 0 for yes.
 * Running sends the inputs side by side; the answer is an i32, then the outputs likewise.
 */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static bool send_all(int connection, const void *data, size_t size) {
    for (const char *at = data; size;) {
        ssize_t sent = send(connection, at, size, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        at += sent;
        size -= (size_t)sent;
    }
    return true;
}

static bool receive_all(int connection, void *data, size_t size) {
    for (char *at = data; size;) {
        ssize_t got = recv(connection, at, size, 0);
        if (got <= 0)
            return false;
        at += got;
        size -= (size_t)got;
    }
    return true;
}

static bool accepted(int connection) {
    int32_t answer = -1;
    return receive_all(connection, &answer, sizeof answer) && answer == 0;
}

static size_t add_names(char *text, size_t length, size_t room, const port *ports, uint32_t count) {
    for (uint32_t i = 0; i < count && length < room; i++)
        length += (size_t)snprintf(text + length, room - length, "%s%s:%u", i ? " " : "\n", ports[i].name,
                                   ports[i].elements);
    return length;
}

bool computes_nothing(void) {
    const char *value = getenv("RKNN_STANDIN_NULL");
    return value && !strcmp(value, "1");
}

int remote_open(const model *m) {
    const char *path = getenv("RKNN_STANDIN_SOCKET");
    if (computes_nothing())
        return REMOTE_NULL;
    if (!path || !*path) {
        complain("RKNN_STANDIN_SOCKET names no process that computes (and RKNN_STANDIN_NULL is not 1)");
        return REMOTE_FAILED;
    }
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0) /* as when the NPU's buffers run out of descriptors */
        return REMOTE_FAILED;
    char text[16384];
    size_t length = (size_t)snprintf(text, sizeof text, "%s", m->identity);
    length = add_names(text, length, sizeof text, m->inputs, m->n_inputs);
    length = add_names(text, length, sizeof text, m->outputs, m->n_outputs);
    uint32_t count = (uint32_t)length;
    if (length < sizeof text && !connect(connection, (struct sockaddr *)&address, sizeof address) &&
        send_all(connection, &count, sizeof count) && send_all(connection, text, length) && accepted(connection))
        return connection;
    complain("the process at %s does not compute %s", path, *m->identity ? m->identity : "a file without identity");
    close(connection);
    return REMOTE_FAILED;
}

bool remote_run(int connection, const float *inputs, size_t n_inputs, float *outputs, size_t n_outputs) {
    uint32_t count = (uint32_t)n_inputs;
    return send_all(connection, &count, sizeof count) &&
           send_all(connection, inputs, n_inputs * sizeof *inputs) && accepted(connection) &&
           receive_all(connection, outputs, n_outputs * sizeof *outputs);
}
