/* Which back end a device name means. */
#include "ops/ops.h"
#include <string.h>

const lg_ops *lg_ops_find(const char *device, lg_error *err) {
    if (!device || !*device || !strcmp(device, "cpu")) return &lg_ops_cpu;
    if (!strcmp(device, "ref")) return &lg_ops_ref;
    if (!strncmp(device, "cuda", 4) && (device[4] == 0 || device[4] == ':')) {
#ifdef LG_CUDA
        return &lg_ops_cuda;
#endif
        lg_base_fail(err, LG_ERR_DEVICE, -1, "device \"%s\": this build has no CUDA back end", device);
        return NULL;
    }
    lg_base_fail(err, LG_ERR_USAGE, -1, "unknown device \"%s\" (cpu, ref, cuda, cuda:N)", device);
    return NULL;
}

bool lg_ops_device_line(int i, char *buf, size_t n, lg_error *err) {
    if (i > 0) {
#ifdef LG_CUDA
        return lg_cuda_device_line(i - 1, buf, n);
#else
        return false;
#endif
    }
    lg_ops_ctx *c;
    const lg_ops_config oc = { .device = "cpu" };
    if (lg_ops_cpu.open(&c, &oc, err) != LG_OK) return false;
    lg_ops_cpu.describe(c, buf, n);
    lg_ops_cpu.close(c);
    return true;
}
