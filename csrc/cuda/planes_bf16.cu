#include "cuda/planes.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueuePlanes<__nv_bfloat16>(const PlanesPlan&, const PlanesArgs&,
                                                  cudaStream_t);

}  // namespace jaxconv::cuda
