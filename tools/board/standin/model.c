/* Reads a .rknn file: "RKNN", 4 zero bytes, u64 file version, u64 size of the body, zeros to byte 64, the body,
 * u64 size of the trailer, the trailer, which is JSON and names the tensors. The custom string lies in the body.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <stdlib.h>
#include <string.h>

enum { HEADER = 64 };

/* -- as much of JSON as the compiler writes: cursors into text that ends with a zero byte -------------------- */

static const char *blanks(const char *at) {
    while (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r' || *at == ',' || *at == ':')
        at++;
    return at;
}

static const char *skip_string(const char *at) {
    for (at++; *at && *at != '"'; at++)
        if (*at == '\\' && at[1])
            at++;
    return *at ? at + 1 : at;
}

/* Skips one value of any kind. */
static const char *skip(const char *at) {
    at = blanks(at);
    if (*at == '"')
        return skip_string(at);
    if (*at != '{' && *at != '[')
        return at + strcspn(at, ",]}");
    int depth = 0;
    do {
        if (*at == '"') {
            at = skip_string(at);
            continue;
        }
        depth += *at == '{' || *at == '[';
        depth -= *at == '}' || *at == ']';
        at++;
    } while (*at && depth);
    return at;
}

/* The value of `key` in the object at `at`; NULL if it has none. */
static const char *member(const char *at, const char *key) {
    at = blanks(at);
    if (*at != '{')
        return NULL;
    size_t length = strlen(key);
    for (at = blanks(at + 1); *at == '"'; at = blanks(skip(at))) {
        const char *name = at + 1;
        at = blanks(skip_string(at));
        if (!strncmp(name, key, length) && name[length] == '"')
            return at;
    }
    return NULL;
}

/* The first element of an array, and the one after `at`; NULL at the end. */
static const char *next(const char *at) {
    at = blanks(at);
    return *at && *at != ']' ? at : NULL;
}

static const char *first(const char *array) {
    array = array ? blanks(array) : "";
    return *array == '[' ? next(array + 1) : NULL;
}

static long number(const char *at) { return at ? strtol(blanks(at), NULL, 10) : -1; }

static void copy_text(char *target, size_t room, const char *at) {
    at = at ? blanks(at) : "";
    size_t length = *at == '"' ? (size_t)(skip_string(at) - at) - 2 : 0;
    if (length >= room)
        length = room - 1;
    memcpy(target, at + 1, length);
    target[length] = 0;
}

/* -- the trailer -------------------------------------------------------------------------------------------- */

static void read_port(port *found, const char *tensor) {
    copy_text(found->name, sizeof found->name, member(tensor, "url"));
    found->n_dims = 0;
    found->elements = 1;
    for (const char *at = first(member(tensor, "size")); at && found->n_dims < RKNN_MAX_DIMS; at = next(skip(at))) {
        found->dims[found->n_dims] = (uint32_t)number(at);
        found->elements *= found->dims[found->n_dims++];
    }
}

static const char *tensor_of(const char *trailer, long id) {
    for (const char *at = first(member(trailer, "norm_tensor")); at; at = next(skip(at)))
        if (number(member(at, "tensor_id")) == id)
            return at;
    return NULL;
}

/* Links {"left": "input" | "output", "left_tensor_id": POSITION, "right_tensor_id": TENSOR}. */
static bool read_ports(model *found, const char *trailer) {
    for (const char *at = first(member(trailer, "graph")); at; at = next(skip(at))) {
        char side[16];
        copy_text(side, sizeof side, member(at, "left"));
        bool is_input = !strcmp(side, "input");
        long position = number(member(at, "left_tensor_id"));
        const char *tensor = tensor_of(trailer, number(member(at, "right_tensor_id")));
        if (!tensor || position < 0 || position >= MAX_PORTS)
            return false;
        uint32_t *count = is_input ? &found->n_inputs : &found->n_outputs;
        read_port(is_input ? &found->inputs[position] : &found->outputs[position], tensor);
        if (*count < position + 1)
            *count = (uint32_t)position + 1;
    }
    return found->n_inputs && found->n_outputs;
}

/* -- the file ----------------------------------------------------------------------------------------------- */

/* The custom string: its length, u32, then its bytes. This project's strings begin with one of `starts`. */
static void read_identity(model *found, const uint8_t *body, size_t size) {
    static const char *const starts[] = {"{\"fingerprint\"", "{\"product\""};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        const uint8_t *text = memmem(body, size, starts[i], strlen(starts[i]));
        uint32_t length = 0;
        if (!text || text < body + 4)
            continue;
        memcpy(&length, text - 4, 4);
        if (length < MAX_IDENTITY && length <= (size_t)(body + size - text)) {
            memcpy(found->identity, text, length);
            found->identity[length] = 0;
            const char *group = member(found->identity, "group");
            copy_text(found->group, sizeof found->group, group ? group : member(found->identity, "product"));
            return;
        }
    }
}

bool model_read(model *found, const uint8_t *bytes, size_t size) {
    uint64_t body = 0, trailer = 0;
    memset(found, 0, sizeof *found);
    if (size < HEADER || memcmp(bytes, "RKNN", 4))
        return false;
    memcpy(&found->file_version, bytes + 8, 8);
    memcpy(&body, bytes + 16, 8);
    if (body > size || HEADER + body + 8 > size)
        return false;
    memcpy(&trailer, bytes + HEADER + body, 8);
    if (trailer > size - HEADER - body - 8)
        return false;
    char *text = malloc(trailer + 1);
    memcpy(text, bytes + HEADER + body + 8, trailer);
    text[trailer] = 0;
    bool good = read_ports(found, text);
    free(text);
    read_identity(found, bytes + HEADER, body);
    return good;
}
