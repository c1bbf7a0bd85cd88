/* A libcuda.so.1 without a device, as far as cuda.bindings asks for it: memory is the host's, modules
   are nothing, and a launch goes to a function that the test has set. */
#include <stdint.h>
#include <string.h>

typedef int Status;
typedef void (*Launch)(void **parameters, unsigned n_blocks, unsigned n_threads, void *stream);

static Launch launch;
static int depth;     /* of contexts */
static void *recorded; /* stream of the one event */
static void *waits[8][2];
static int n_waits;

void stub_set_launch(Launch function) { launch = function; }
int stub_depth(void) { return depth; }
int stub_waits(void *pairs[8][2]) { return memcpy(pairs, waits, sizeof waits), n_waits; }

static Status succeed(void) { return 0; }

static Status cuDeviceGet(int *device, int number) { return (*device = number), 0; }
static Status cuDriverGetVersion(int *version) { return (*version = 13000), 0; }
static Status cuDevicePrimaryCtxRetain(void **context, int device) {
  return (*context = (void *)(intptr_t)(0x1000 + device)), 0;
}
static Status cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0;
  return 0;
}
static Status cuCtxPushCurrent(void *context) {
  ++depth;
  return context == (void *)0x1000 ? 0 : 201;
}
static Status cuCtxPopCurrent(void **context) {
  --depth;
  return (*context = (void *)0x1000), 0;
}
static Status cuStreamIsCapturing(void *stream, int *status) {
  (void)stream;
  return (*status = 0), 0;
}
static Status cuPointerGetAttribute(int *value, int attribute, uint64_t address) {
  (void)address;
  return (*value = 0), attribute == 9 ? 0 : 1;
}
static Status cuEventCreate(void **event, unsigned flags) {
  *event = (void *)0x4000;
  return flags == 2 ? 0 : 1;
}
static Status cuEventRecord(void *event, void *stream) {
  recorded = stream;
  return event == (void *)0x4000 ? 0 : 400;
}
static Status cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
  waits[n_waits % 8][0] = stream;
  waits[n_waits++ % 8][1] = recorded;
  return event == (void *)0x4000 && !flags ? 0 : 400;
}
static Status cuModuleLoadData(void **module, const void *image) {
  *module = (void *)0x2000;
  return memcmp(image, "\177ELF", 4) ? 200 : 0;
}
static Status cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)0x3000;
  return module == (void *)0x2000 && *name ? 0 : 500;
}
static Status cuLaunchKernel(
    void *function, unsigned x, unsigned y, unsigned z, unsigned n_threads, unsigned u, unsigned v,
    unsigned shared, void *stream, void **parameters, void **extra) {
  if (function != (void *)0x3000 || y != 1 || z != 1 || u != 1 || v != 1 || shared || extra) return 1;
  launch(parameters, x, n_threads, stream);
  return 0;
}

static const struct {
  const char *name;
  void *function;
} FUNCTIONS[] = {
    {"cuDeviceGet", cuDeviceGet},
    {"cuDriverGetVersion", cuDriverGetVersion},
    {"cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain},
    {"cuDeviceGetAttribute", cuDeviceGetAttribute},
    {"cuCtxPushCurrent", cuCtxPushCurrent},
    {"cuCtxPopCurrent", cuCtxPopCurrent},
    {"cuStreamIsCapturing", cuStreamIsCapturing},
    {"cuPointerGetAttribute", cuPointerGetAttribute},
    {"cuEventCreate", cuEventCreate},
    {"cuEventRecord", cuEventRecord},
    {"cuStreamWaitEvent", cuStreamWaitEvent},
    {"cuModuleLoadData", cuModuleLoadData},
    {"cuModuleGetFunction", cuModuleGetFunction},
    {"cuLaunchKernel", cuLaunchKernel},
};

Status cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  if (status) *status = 0;
  *found = strcmp(name, "cuGetProcAddress") ? (void *)succeed : (void *)cuGetProcAddress_v2;
  for (unsigned i = 0; i < sizeof FUNCTIONS / sizeof *FUNCTIONS; ++i)
    if (!strcmp(name, FUNCTIONS[i].name)) *found = FUNCTIONS[i].function;
  return 0;
}
