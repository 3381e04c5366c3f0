/* Runs packed networks: files that subbyte.save wrote with an example of the input
 * (docs/runtime.md).
 *
 * A network may be run from several threads at once. Every function that can fail returns 0 for
 * success and -1 for failure; subbyte_last_error then says in one line what was wrong. */
#ifndef SUBBYTE_H
#define SUBBYTE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SUBBYTE_API
#else
#define SUBBYTE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SUBBYTE_MOST_DIMENSIONS 16

typedef struct subbyte_network subbyte_network;

typedef enum {
  SUBBYTE_FLOAT32 = 0,
  SUBBYTE_FLOAT64 = 1,
  SUBBYTE_FLOAT16 = 2,
  SUBBYTE_BFLOAT16 = 3,
  SUBBYTE_INT64 = 4,
  SUBBYTE_INT32 = 5,
  SUBBYTE_INT16 = 6,
  SUBBYTE_INT8 = 7,
  SUBBYTE_UINT8 = 8,
  SUBBYTE_BOOL = 9
} subbyte_dtype;

/* Values in C order without gaps. name: of an input or output, valid until the network is closed;
 * not read. In what subbyte_input fills, a size of -1 may be any, and data is null. */
typedef struct {
  subbyte_dtype dtype;
  int32_t rank;
  int64_t shape[SUBBYTE_MOST_DIMENSIONS];
  void* data;
  const char* name;
} subbyte_tensor;

typedef enum {
  SUBBYTE_PRECISION_INT8 = 0,
  SUBBYTE_PRECISION_INT16 = 1,
  SUBBYTE_PRECISION_FLOAT32 = 2,
  SUBBYTE_PRECISION_DYNAMIC = 3
} subbyte_precision;

/* precision: of activations in the products of packed layers. int8 uses the file's scales of
 * activations where it has any, and keeps them in 8 bits between layers; dynamic rounds them to
 * int8 at each layer, by the largest value of a row or image. verify: by the file's checksums.
 * memory: bytes that the values of one run may take at most, 0 for the default of 16 GiB. */
typedef struct {
  subbyte_precision precision;
  int verify;
  uint64_t memory;
} subbyte_options;

/* One step of a run: the operator, its result's name, the layer or "", the arithmetic. */
typedef struct {
  const char *op, *out, *layer, *how;
  double seconds;
} subbyte_step;

SUBBYTE_API const char* subbyte_version(void);

/* What went wrong last on this thread, "" if nothing has; valid until its next call. */
SUBBYTE_API const char* subbyte_last_error(void);

/* options: null for int8, with checksums. */
SUBBYTE_API int subbyte_open(const char* path, const subbyte_options* options,
                             subbyte_network** network);
/* The same from memory, which is copied. */
SUBBYTE_API int subbyte_open_memory(const void* data, size_t bytes, const subbyte_options* options,
                                    subbyte_network** network);
/* No run may be going on. Null is let through. */
SUBBYTE_API void subbyte_close(subbyte_network* network);

SUBBYTE_API int32_t subbyte_input_count(const subbyte_network* network);
SUBBYTE_API int subbyte_input(const subbyte_network* network, int32_t index, subbyte_tensor* input);

/* Types, shapes and names of the results for inputs of these types and shapes; no data is read.
 * outputs: room for `most` of them, or null; count: how many there are. */
SUBBYTE_API int subbyte_outputs(subbyte_network* network, const subbyte_tensor* inputs,
                                int32_t input_count, subbyte_tensor* outputs, int32_t most,
                                int32_t* count);

/* outputs: as subbyte_outputs gave them, with data to write to. */
SUBBYTE_API int subbyte_run(subbyte_network* network, const subbyte_tensor* inputs,
                            int32_t input_count, const subbyte_tensor* outputs,
                            int32_t output_count, int32_t threads);

/* The same, with a call for every step, after it. */
SUBBYTE_API int subbyte_profile(subbyte_network* network, const subbyte_tensor* inputs,
                                int32_t input_count, const subbyte_tensor* outputs,
                                int32_t output_count, int32_t threads,
                                void (*seen)(void* context, const subbyte_step* step),
                                void* context);

/* A run that shows the result of every operation of the program as it is made, by its name ("n3",
 * "n4.1" for an element of a list). The data are valid during the call. */
SUBBYTE_API int subbyte_watch(subbyte_network* network, const subbyte_tensor* inputs,
                              int32_t input_count, int32_t threads,
                              void (*seen)(void* context, const subbyte_tensor* value),
                              void* context);

/* What the command subbyte-run does: its words, the first of which is its name; its exit code. */
SUBBYTE_API int subbyte_command(int32_t count, char** words);

#ifdef __cplusplus
}
#endif

#endif
