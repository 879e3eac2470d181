/* CUDA entry points that torch asks before it computes anything, answered for one device that
   computes nothing. Loaded before the CUDA runtime (LD_PRELOAD), and found as the driver
   (libcuda.so.1). Tensors on that device have a shape and no memory, so nothing else is called.
   0 is cudaSuccess. */

static int nothing;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return device == 0 ? 0 : 101; /* cudaErrorInvalidDevice */ }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaFree(void *memory) { (void)memory; return 0; }

/* The caller's structure is zero: compute capability 0.0, on which attention is composed. */
int cudaGetDeviceProperties(void *properties, int device)
{ (void)properties; (void)device; return 0; }
int cudaGetDeviceProperties_v2(void *properties, int device)
{ (void)properties; (void)device; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device)
{ (void)attribute; (void)device; *value = 0; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *status)
{ (void)name; (void)version; (void)flags; (void)status; *function = 0; return 0; }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{ *least = 0; *greatest = 0; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority)
{ (void)flags; (void)priority; *stream = &nothing; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { (void)mode; return 0; }
int cudaStreamQuery(void *stream) { (void)stream; return 0; }
int cudaStreamSynchronize(void *stream) { (void)stream; return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags)
{ (void)stream; (void)event; (void)flags; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags)
{ (void)flags; *event = &nothing; return 0; }
int cudaEventRecord(void *event, void *stream) { (void)event; (void)stream; return 0; }
int cudaEventQuery(void *event) { (void)event; return 0; }
int cudaEventSynchronize(void *event) { (void)event; return 0; }
int cudaEventDestroy(void *event) { (void)event; return 0; }
int cudaDeviceSynchronize(void) { return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{ (void)device; *flags = 0; *active = 1; return 0; }
