// Stands in for OpenCV's header of the same name while FFCV is built: only what FFCV uses. See ../opencv4.pc.
#pragma once
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
