// hybridattn: language models with hybrid attention, as C++ types. The one door: include this.
#ifndef HYBRIDATTN_HYBRIDATTN_HPP
#define HYBRIDATTN_HYBRIDATTN_HPP

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/infer/generate.hpp>
#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/nn/pattern.hpp>
#include <hybridattn/train/adamw.hpp>
#include <hybridattn/train/data.hpp>
#include <hybridattn/train/schedule.hpp>
#include <hybridattn/train/train_step.hpp>

#if HYBRIDATTN_CUDA
#include <hybridattn/cuda.cuh>
#endif

#endif
