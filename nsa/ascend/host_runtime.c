/* What a lowered kernel needs at run time on a CPU: buffers, strided copies, and a loop over its programs. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Buffers stand for on-chip memory: they live as long as the program that asked for them. */
static _Thread_local void **buffers;
static _Thread_local size_t n_buffers, room;

void *_mlir_memref_to_llvm_alloc(size_t size) {
  if (n_buffers == room) {
    room = room ? 2 * room : 64;
    buffers = realloc(buffers, room * sizeof *buffers);
  }
  void *buffer = buffers ? malloc(size) : NULL;
  if (!buffer) {
    fprintf(stderr, "ascend-host: no memory for an on-chip buffer of %zu bytes\n", size);
    abort();
  }
  return buffers[n_buffers++] = buffer;
}

void _mlir_memref_to_llvm_free(void *buffer) { (void)buffer; }

static void end_program(void) {
  while (n_buffers) free(buffers[--n_buffers]);
}

/* memref.copy between strided views: MLIR passes (rank, descriptor) of each side. */
typedef struct {
  int64_t rank;
  struct {
    char *allocated, *aligned;
    int64_t offset, sizes_and_strides[];
  } *view;
} Unranked;

static void copy(int64_t rank, const int64_t *sizes, const int64_t *from_strides, const int64_t *to_strides,
                 const char *from, char *to, int64_t element) {
  if (rank == 0) {
    memcpy(to, from, element);
  } else if (rank == 1 && *from_strides == 1 && *to_strides == 1) {
    memcpy(to, from, *sizes * element);
  } else {
    for (int64_t i = 0; i < *sizes; i++)
      copy(rank - 1, sizes + 1, from_strides + 1, to_strides + 1, from + i * *from_strides * element,
           to + i * *to_strides * element, element);
  }
}

void memrefCopy(int64_t element, Unranked *from, Unranked *to) {
  int64_t rank = from->rank;
  const int64_t *sizes = from->view->sizes_and_strides;
  copy(rank, sizes, sizes + rank, to->view->sizes_and_strides + rank,
       from->view->aligned + from->view->offset * element, to->view->aligned + to->view->offset * element, element);
}

#if defined __FLT16_MAX__ && __GNUC__ < 13 /* libgcc has it from 13 on */
/* fp32 to bf16, to nearest even: what LLVM calls. A bf16 is returned where a half is, in the low bits of a register. */
__attribute__((weak)) _Float16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint16_t rounded = value != value ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  _Float16 result;
  memcpy(&result, &rounded, sizeof result);
  return result;
}
#endif

/* Float arguments come as the bits of a slot. */
static inline float as_float(int64_t slot) {
  float value;
  memcpy(&value, &slot, sizeof value);
  return value;
}

static inline double as_double(int64_t slot) {
  double value;
  memcpy(&value, &slot, sizeof value);
  return value;
}

#ifdef __FLT16_MAX__ /* older compilers have no 16-bit floats */
static inline _Float16 as_half(int64_t slot) {
  _Float16 value;
  memcpy(&value, &slot, sizeof value);
  return value;
}
#endif

/* KERNEL, PARAMETERS and ARGUMENTS come from the kernel's signature. */
extern void KERNEL(PARAMETERS);

/* Programs first, first + step, ... of the grid (x, y, z); args holds a slot for each argument. */
void run_programs(const int64_t *args, int32_t x, int32_t y, int32_t z, int64_t first, int64_t step) {
  for (int64_t i = first; i < (int64_t)x * y * z; i += step) {
    int32_t i_x = i % x, i_y = i / x % y, i_z = i / x / y;
    KERNEL(ARGUMENTS);
    end_program();
  }
}
