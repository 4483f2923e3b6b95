// The Python module. Importing it registers the ops; its one function tells how it was built.
#include <Python.h>

#include "rf_build_info.h"
#include "stable.h"

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, library) {
  resnet_fused::define_bn_act(library);
  resnet_fused::define_bn_finalize(library);
  resnet_fused::define_bn_training(library);
#if defined(RF_WITH_CUDA)
  resnet_fused::define_bn_add_act_conv_stats(library);
  resnet_fused::define_conv_bn_act(library);
  resnet_fused::define_conv_bn_act_fp8(library);
  resnet_fused::define_conv_bn_dgrad(library);
  resnet_fused::define_conv_bn_dgrad_end(library);
  resnet_fused::define_conv_bn_grad1x1(library);
  resnet_fused::define_conv_bn_grad1x1_end(library);
  resnet_fused::define_conv_bn_stats(library);
  resnet_fused::define_conv_bn_stats_finalize(library);
  resnet_fused::define_conv_bn_wgrad(library);
  resnet_fused::define_conv_gradients(library);
  resnet_fused::define_conv_chain(library);
  resnet_fused::define_conv_chain_fp8(library);
  resnet_fused::define_network(library);
  resnet_fused::define_stem(library);
  resnet_fused::define_head(library);
#endif
}

static PyObject* build_info(PyObject*, PyObject*) {
  return PyUnicode_FromString(RF_BUILD_INFO);  // JSON, written by CMakeLists.txt
}

static PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "How this extension was built, as JSON: cuda, nvcc, archs, compiler, torch_target."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
