// Counts of what was asked for, in all and by the names of kernels.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stand_in.h"

EXPORT struct counts counts;

enum { SLOTS = 4096 };
static struct {
    char* name;
    long launches;
} named[SLOTS];
static pthread_mutex_t naming = PTHREAD_MUTEX_INITIALIZER;

void count_name(const char* name) {
    static int wanted = -1;
    if (wanted < 0) wanted = getenv("CUDA_HOST_NAMES") != NULL;
    if (!wanted || !name) return;
    unsigned long hash = 5381;
    for (const char* c = name; *c; c++) hash = hash * 33 + (unsigned char)*c;
    pthread_mutex_lock(&naming);
    for (int tried = 0; tried < SLOTS; tried++) {
        int at = (hash + tried) % SLOTS;
        if (named[at].name && strcmp(named[at].name, name)) continue;
        if (!named[at].name) named[at].name = strdup(name);
        named[at].launches++;
        break;
    }
    pthread_mutex_unlock(&naming);
}

// Writes "launches name" lines of what was counted since the last call.
EXPORT void cuda_host_write_names(const char* path) {
    FILE* file = fopen(path, "w");
    if (!file) return;
    pthread_mutex_lock(&naming);
    for (int at = 0; at < SLOTS; at++) {
        if (named[at].launches) fprintf(file, "%ld %s\n", named[at].launches, named[at].name);
        named[at].launches = 0;
    }
    pthread_mutex_unlock(&naming);
    fclose(file);
}
