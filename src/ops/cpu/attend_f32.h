/* Words of attend_flash.h that are one f32. */
enum { PACK = 1 };
INLINE vf w_all(const float *p) { return v_set(*p); }
INLINE void w_fma(vf *a, vf x, vf y) { v_fma(a, x, y); }
INLINE vf w_line(const vf *x) { return x[0]; }
INLINE vf w_join(const vf *x) { return x[0]; }
