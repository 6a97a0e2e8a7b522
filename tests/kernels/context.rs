//! The driver's side. On a machine with a card every test of a kernel runs once more, on the card; without one that is
//! said and passes, unless the environment variable STUNET_GPU is `require`. STUNET_GPU_TESTS names a part of them: words of
//! which a test's name has to hold one, and words after a minus sign of which it must hold none.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use stunet::models::StuNetConfig;
use stunet::tensor::cuda::{Context, Driver};
use stunet::{Device, Error, Precision};

use super::sim::{Sim, on_card};
use super::{
    aggregate, augment, channel_sums, conv_transpose3d, conv3d, conv3d_dgrad, conv3d_first, conv3d_join,
    conv3d_residual, conv3d_tma, conv3d_wgrad, device, head_labels, head_loss, instance_norm, instance_norm_grad,
    moments, network, optim, pool, probe, relayout, resample, runtime, train,
};

/// Tests that only the interpreter can run, and why.
const INTERPRETED: &[(&str, &str)] = &[
    ("ptx_on_a_card", "runs the others"),
    ("ptx_on_what_stands_in_for_a_card", "runs some of the others"),
    ("ptx_parameters_have_the_size_of_their_structs", "runs nothing"),
    ("ptx_has_no_entry_that_the_host_side_does_not_know", "runs nothing"),
    ("ptx_in_the_program_is_the_checked_in_files", "runs nothing"),
    ("ptx_conv3d_wastes_no_bank_and_no_sector", "counts what a card does not count"),
    ("ptx_conv3d_first_wastes_no_sector", "counts what a card does not count"),
    ("ptx_conv3d_residual_refuses_what_does_not_fit", "ends before anything runs"),
    ("ptx_conv3d_residual_wastes_no_bank_and_no_sector", "counts what a card does not count"),
    ("cuda_train_conv3d_join_refuses_what_does_not_fit", "ends before anything runs"),
    ("cuda_train_conv3d_wgrad_refuses_what_does_not_fit", "ends before anything runs"),
    ("cuda_train_conv3d_wgrad_wastes_no_bank_and_no_sector", "counts what a card does not count"),
    ("cuda_train_conv3d_wgrad_is_cut_for_the_card", "runs nothing"),
    ("cuda_train_optim_wastes_no_sector", "counts what a card does not count"),
    ("cuda_train_optim_refuses_what_does_not_fit", "ends before anything runs"),
    ("ptx_faults_in_conv3d_are_found", "finds what a card does not find"),
    ("ptx_conv3d_in_bf16_is_refused_on_cards_before_ampere", "ends before anything runs"),
    ("ptx_conv3d_refuses_memory_that_is_too_small", "ends before anything runs"),
    ("ptx_conv3d_is_cut_where_a_card_would_idle", "runs nothing"),
    ("ptx_conv3d_tma_is_for_its_card_and_problems", "has cards of three generations"),
    ("ptx_conv3d_tma_faults_are_found_by_a_trial", "finds what a card does not find"),
    ("ptx_runtime_a_missing_wait_is_found", "plants a fault that a fast card hides"),
    ("ptx_runtime_windows_are_staged_beside_work_on_a_shared_card", "counts what a card does not count"),
    ("ptx_runtime_idle_memory_is_given_up", "has a card of 1 MiB"),
    ("ptx_graph_beside_another_thread", "has a thread that knows of no card"),
    ("ptx_runtime_threads_beside_a_card", "runs nothing"),
    ("ptx_operands_are_what_they_are_taken_for", "has several cards of two generations"),
];

macro_rules! tests {
    ($($file:ident::$test:ident,)*) => { &[$((stringify!($test), $file::$test)),*] };
}

/// All others.
const ON_A_CARD: &[(&str, fn())] = tests![
    augment::cuda_train_augment_warps,
    augment::cuda_train_augment_adds_noise,
    augment::cuda_train_augment_filters,
    augment::cuda_train_augment_knows_statistics,
    augment::cuda_train_augment_mirrors_and_masks,
    augment::cuda_train_augment_whole_batches,
    relayout::ptx_relayout_there_and_back,
    relayout::ptx_relayout_takes_a_window,
    conv3d::ptx_conv3d_plain_in_f32,
    conv3d::ptx_conv3d_of_ragged_sizes_and_channels,
    conv3d::ptx_conv3d_of_a_batch_in_f16_with_bias,
    conv3d::ptx_conv3d_strides_and_kernels,
    conv3d::ptx_conv3d_normalises_as_it_reads,
    conv3d::ptx_conv3d_reads_two_sources_the_first_repeated,
    conv3d::ptx_conv3d_on_cards_before_ampere,
    conv3d::ptx_conv3d_of_one_voxel,
    conv3d::ptx_conv3d_in_parts,
    conv3d_first::ptx_conv3d_first,
    conv3d_first::ptx_conv3d_first_strides,
    conv3d_first::ptx_conv3d_first_over_many_tiles,
    conv3d_residual::ptx_conv3d_residual,
    conv3d_residual::ptx_conv3d_residual_of_planes,
    conv3d_residual::ptx_conv3d_residual_of_many_channels,
    conv3d_residual::ptx_conv3d_residual_over_many_tiles,
    conv_transpose3d::ptx_conv_transpose3d,
    moments::ptx_moments_of_a_tensor,
    moments::ptx_moments_do_not_cancel,
    moments::ptx_moments_of_many_tiles,
    instance_norm::ptx_instance_norm_ends_a_block,
    instance_norm::ptx_instance_norm_in_place,
    head_labels::ptx_head_labels,
    head_labels::ptx_head_labels_of_equal_scores,
    head_labels::ptx_head_labels_of_sums_over_windows,
    aggregate::ptx_aggregate_adds_windows_in_order,
    aggregate::ptx_aggregate_scores,
    resample::ptx_resample_labels,
    resample::ptx_resample_labels_paints_regions,
    resample::ptx_resample_labels_of_odd_and_of_equal_values,
    probe::ptx_probe_products_are_all_done,
    probe::ptx_probe_copies,
    probe::ptx_probe_rates,
    network::ptx_network_in_f32_is_the_cpus,
    network::ptx_network_in_16_bit_is_near_the_cpus,
    runtime::ptx_runtime_uploads_arrive,
    runtime::ptx_graph_of_a_pass_gives_the_same_bytes,
    runtime::ptx_graph_of_another_network_is_never_run,
    runtime::ptx_graph_of_boxes_by_tma_gives_the_same_bytes,
    device::ptx_stunet_through_the_library,
    device::ptx_devices_are_honest,
    device::ptx_prediction_through_the_library,
    device::ptx_prediction_on_another_grid_through_the_library,
    device::ptx_prediction_of_unets_through_the_library,
    device::ptx_variants_through_the_library,
    device::ptx_head_labels_that_stay,
    device::ptx_first_layers_through_the_library,
    conv3d_wgrad::cuda_train_conv3d_wgrad_in_f32,
    conv3d_wgrad::cuda_train_conv3d_wgrad_of_ragged_sizes_and_channels,
    conv3d_wgrad::cuda_train_conv3d_wgrad_strides_and_kernels,
    conv3d_wgrad::cuda_train_conv3d_wgrad_of_one_voxel,
    conv3d_wgrad::cuda_train_conv3d_wgrad_transposed,
    conv3d_wgrad::cuda_train_conv3d_wgrad_reads_two_sources_the_first_repeated,
    conv3d_wgrad::cuda_train_conv3d_wgrad_in_parts,
    channel_sums::cuda_train_channel_sums,
    channel_sums::cuda_train_channel_sums_that_cancel,
    head_loss::cuda_train_head_loss_of_labels,
    head_loss::cuda_train_head_loss_of_one_term,
    head_loss::cuda_train_head_loss_of_regions,
    head_loss::cuda_train_head_loss_of_many_channels_and_classes,
    head_loss::cuda_train_head_loss_over_many_tiles,
    head_loss::cuda_train_head_loss_of_a_strange_label,
    head_loss::cuda_train_head_loss_at_another_size,
    optim::cuda_train_optim_squares,
    optim::cuda_train_optim_sgd,
    optim::cuda_train_optim_adam,
    optim::cuda_train_optim_packs_without_a_step,
    optim::cuda_train_optim_halves_are_packed_for_two_sources,
    optim::cuda_train_optim_changes_nothing_unless_all_is_finite,
    conv3d_join::cuda_train_conv3d_join,
    conv3d_dgrad::cuda_train_conv3d_dgrad,
    conv3d_dgrad::cuda_train_conv3d_dgrad_strides,
    instance_norm_grad::cuda_train_instance_norm_grad,
    pool::cuda_train_pool,
    train::cuda_train_step_is_the_cpus,
    train::cuda_train_step_of_unets_is_the_cpus,
    train::cuda_train_step_of_unets_that_recompute,
    train::cuda_train_step_in_16_bit_is_near_the_cpus,
    train::cuda_train_steps_have_the_same_bytes_in_any_order,
    train::cuda_train_in_float16_scales_the_loss,
    train::cuda_train_graph_is_whole_after_a_change,
    // Last: a kernel that waits for what never comes would keep the others from running.
    conv3d::ptx_conv3d_on_hopper,
    conv3d_tma::ptx_conv3d_tma_of_ragged_sizes_and_channels,
    conv3d_tma::ptx_conv3d_tma_of_a_batch_in_f16_with_bias,
    conv3d_tma::ptx_conv3d_tma_normalises_as_it_reads,
    conv3d_tma::ptx_conv3d_tma_in_parts,
    conv3d_tma::ptx_conv3d_tma_reads_voxels_twice,
    conv3d_tma::ptx_conv3d_tma_strides,
    conv3d_tma::ptx_conv3d_tma_with_filters_that_stay,
];

/// The first card.
fn card() -> Option<Arc<dyn Driver>> {
    match Context::open(0) {
        Ok(card) => Some(Arc::new(card)),
        Err(Error::Device { what }) => {
            assert!(std::env::var_os("STUNET_GPU").is_none_or(|v| v != "require"), "a card is required: {what}");
            eprintln!("skipped: {what}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn ptx_on_a_card() {
    let Some(card) = card() else { return };
    assert!(Context::open(1000).is_err());
    let [major, minor] = card.capability();
    println!("{}, compute capability {major}.{minor}", card.name());
    let words = std::env::var("STUNET_GPU_TESTS").unwrap_or_default();
    let (without, words): (Vec<&str>, Vec<&str>) = words.split_whitespace().partition(|w| w.starts_with('-'));
    let without: Vec<&str> = without.iter().map(|w| &w[1..]).collect();
    let (mut failed, mut ran) = (Vec::new(), 0);
    let mut step = |name: &str, f: &dyn Fn()| {
        if (!words.is_empty() && !words.iter().any(|w| name.contains(w))) || without.iter().any(|w| name.contains(w)) {
            return;
        }
        ran += 1;
        let begin = std::time::Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(f)).is_ok();
        println!("{name}: {} after {:.1?}", if passed { "ok" } else { "FAILED" }, begin.elapsed());
        if !passed {
            failed.push(name.to_owned());
        }
    };
    // Older cards know a part of the storages, and of the tests only the networks tell them apart.
    let known = if major < 8 { &[][..] } else { ON_A_CARD };
    for (name, test) in known {
        step(name, &|| on_card(&card, test));
    }
    // As a program takes it, in two contexts, and at sizes that the interpreter has no time for.
    let small = StuNetConfig::small(1, 105);
    let precisions = [Precision::F32, Precision::F16, Precision::Bf16];
    for precision in precisions.into_iter().take(if major < 8 { 2 } else { 3 }) {
        step(&format!("STU-Net-S at 64^3 in {}", precision.name()), &|| {
            let cards = (0..2).map(|_| Device::cuda(0).unwrap());
            device::network_is_near(&small, [64; 3], precision, cards);
        });
    }
    assert!(failed.is_empty() && ran > 0, "of {ran} failed {failed:?}");
}

/// What stands between the tests and a card, with an interpreter at its end.
#[test]
fn ptx_on_what_stands_in_for_a_card() {
    let card: Arc<dyn Driver> = Arc::new(Sim::of(7, [8, 6]));
    on_card(&card, || {
        assert_eq!(Sim::of(0, [9, 0]).capability(), [8, 6]);
        relayout::ptx_relayout_takes_a_window();
        instance_norm::ptx_instance_norm_in_place();
        aggregate::ptx_aggregate_adds_windows_in_order();
        device::ptx_devices_are_honest();
    });
    assert_eq!(Sim::of(0, [9, 0]).capability(), [9, 0]);
}

/// A test that nobody names here, or no part of `gpu_run.sh check` takes, would silently not run on a card.
#[test]
fn every_test_of_a_kernel_runs_on_a_card() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let visit = std::fs::read_to_string(root.join("benches/gpu_run.sh")).unwrap();
    let parts = visit.split("for part in ").nth(1).and_then(|l| l.split(';').next()).unwrap();
    for (name, _) in ON_A_CARD {
        assert!(parts.split(' ').any(|p| name.contains(p)), "{name} is in no part of gpu_run.sh");
    }
    for file in std::fs::read_dir(root.join("tests/kernels")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for line in text.lines().filter(|l| l.trim_end().ends_with("() {")) {
            let Some(name) = line.split("fn ").nth(1).and_then(|l| l.split('(').next()) else { continue };
            let known = ON_A_CARD.iter().any(|t| t.0 == name)
                || INTERPRETED.iter().any(|(n, why)| *n == name && !why.is_empty());
            assert!(
                known || !(name.starts_with("ptx_") || name.starts_with("cuda_train_")),
                "{name} is neither in ON_A_CARD nor in INTERPRETED"
            );
        }
    }
}
