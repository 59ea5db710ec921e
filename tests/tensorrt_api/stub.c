/* The symbols that TensorRT's Python bindings ask of its libraries, so that they load where TensorRT is not.
   Each factory gives a null pointer: nothing can be built or run, the classes can only be looked at. */
#include <stddef.h>

#define FACTORY(name) void *name(void) { return NULL; }

FACTORY(createInferBuilder_INTERNAL)
FACTORY(createInferRefitter_INTERNAL)
FACTORY(createInferRuntime_INTERNAL)
FACTORY(createNvOnnxParser_INTERNAL)
FACTORY(createNvOnnxParserRefitter_INTERNAL)
FACTORY(getBuilderPluginRegistry)
FACTORY(getPluginRegistry)
/* Of the Caffe and UFF parsers, which version 8 still had. */
FACTORY(_ZN11nvuffparser15createUffParserEv)
FACTORY(_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi)
FACTORY(_ZN14nvcaffeparser117createCaffeParserEv)
FACTORY(_ZN14nvcaffeparser123shutdownProtobufLibraryEv)

int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
