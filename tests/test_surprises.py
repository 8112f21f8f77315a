"""Which tests check which kind of surprise: what real folders, files, shells and people do to the programs.

KINDS has one row for each kind that was reported: the kind in plain words, and the tests of it in the rooms'
modules. Each kind needs at least three cases that differ (relatives), because a single one is easily repaired
without its kind. So whoever removes or renames a test is told here which kind is no longer checked.

A test counts once for each of its parameters. A number behind it, as in "test_a::test_b*5", replaces that
count. It was counted by reading, and nothing else checks it: the inputs that are looped over or written out
within the test, or those of its parameters that belong to the kind.
"""

import ast
import importlib
import inspect
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import DONE

import networks
import train
from ranks import ALONE

KINDS = {
    # ---- people lose hours
    "an encoder whose files are fp16 or bf16": [
        "test_conditioning::test_network_inputs_are_float32",
        "test_conditioning::test_encoders_in_half_precision_train_and_draw",
        "test_encoders::test_encoders_in_half_precision"],
    "a small batch bounds the memory of start-up, validation and previews": [
        "test_train::test_memory_outside_training_steps_follows_the_batch",
        "test_train::test_memory_of_the_vae_follows_the_batch*3"],
    "copied, touched or moved pictures are the same data, others are not": [
        "test_folder::test_the_same_bytes_are_the_same_data*4",
        "test_folder::test_other_pictures_are_other_data",
        "test_folder::test_large_files_are_compared_at_many_places",
        "test_files::test_fingerprints_of_files_follow_names_sizes_and_ends*4"],
    "other pictures have a way forward that works": [
        "test_plan::test_pictures_that_changed*3",
        "test_train::test_the_way_forward_with_other_pictures*2"],
    "all spellings of a path name one folder": [
        "test_settings::test_spellings_of_one_path*15",
        "test_folder::test_the_same_bytes_are_the_same_data*5",
        "test_plan::test_a_vae_of_other_settings_is_never_taken_without_a_word*2"],
    "a run that moved, or without what it began from, goes on": [
        "test_plan::test_a_run_that_moved_goes_on_with_the_vae_in_its_checkpoint",
        "test_plan::test_a_vae_trained_under_another_name_may_be_moved_there",
        "test_published::test_fine_tuning_begins_where_the_published_model_is"],
    "an interrupted run does not exit with 0": [
        "test_train::test_signals_finish_the_step_and_save",
        "test_train::test_a_signal_ends_a_validation_or_a_preview",
        "test_train::test_a_signal_during_the_vae_ends_the_command",
        "test_sample::test_an_interruption_says_how_far_it_came"],

    "one of several processes is killed": [
        "test_faults::test_killed_at_any_moment_and_in_a_save*6",
        "test_faults::test_killed_before_a_checkpoint_names_the_folder_of_its_optimizer",
        "test_parallel::test_where_a_process_is_killed_the_others_end_and_the_run_goes_on"],
    "one of several processes hangs": [
        "test_faults::test_a_rank_that_hangs_is_named",
        "test_faults::test_a_process_that_hangs_ends_by_itself"],
    "one of several processes has a full disk": [
        "test_faults::test_a_full_disk_ends_all_and_keeps_the_checkpoint"],
    "a damaged or hostile folder of the optimizer": [
        "test_faults::test_a_damaged_folder_of_the_optimizer_is_one_line",
        "test_faults::test_the_optimizers_folder_starts_no_program",
        "test_faults::test_an_entry_of_the_optimizer_that_was_changed"],
    "a checkpoint that is damaged or missing, beside others that are kept": [
        "test_faults::test_kept_checkpoints_have_their_optimizer_and_one_can_be_copied_back",
        "test_faults::test_no_kept_checkpoint_goes_before_the_new_one_is_read_back",
        "test_faults::test_a_checkpoint_that_is_missing_is_not_begun_anew"],

    # ---- silently wrong
    "symbolic links in a picture folder": ["test_folder::test_links_are_followed_once*10"],
    "hidden and system files": ["test_folder::test_hidden_and_system_files_are_ignored"],
    "transparency in a mask": ["test_sample::test_what_is_transparent_in_a_mask_is_kept"],
    "classes with one picture": ["test_folder::test_validation_is_taken_per_class*6"],
    "classes whose pictures are all broken": [
        "test_data::test_classes_are_listed_after_decoding*2",
        "test_folder::test_pictures_that_may_not_be_read_are_named"],
    "labels beside classes named like numbers": [
        "test_conditioning::test_a_label_is_a_name_or_an_unambiguous_index",
        "test_conditioning::test_an_index_beside_classes_named_like_numbers_is_refused"],
    "numbers in names of classes sort as numbers": ["test_folder::test_classes_sort_naturally"],
    "rows of classes go by their names when weights are taken over": [
        "test_plan::test_rows_of_classes_go_by_their_names*10"],
    "--init-from a run of another prediction or objective": [
        "test_plan::test_init_from_a_run_whose_weights_mean_something_else"],
    "--init-from a run on another VAE": ["test_plan::test_init_from_a_run_on_another_vae*4"],
    "embedded colour profiles": [
        "test_pictures::test_colour_profiles_become_srgb",
        "test_pictures::test_other_profiles_leave_every_bit",
        "test_pictures::test_a_profile_keeps_transparency"],

    # ---- crashes and messages
    "damaged caches of pictures": [
        "test_folder::test_a_damaged_cache_of_pictures_is_rebuilt",
        "test_folder::test_an_edited_stamp_does_no_harm"],
    "damaged caches of latents": [
        "test_cache::test_damaged_latents_are_rebuilt", "test_cache::test_stale_latents_are_rebuilt*3"],
    "damaged caches of text": ["test_cache::test_a_damaged_text_cache_is_rebuilt"],
    "printed commands are quoted for a shell": [
        "test_conditioning::test_the_hint_quotes_what_a_shell_would_split*9",
        "test_settings::test_the_command_of_settings"],
    "characters that a console lacks": ["test_cli::test_characters_that_a_console_lacks_are_escaped"],
    "file systems without locks": ["test_files::test_a_file_system_without_locks"],

    # ---- hostile folders, files and machines
    "pictures start no program": ["test_folder::test_pictures_start_no_program"],
    "pipes, devices and sockets are not read": [
        "test_folder::test_what_is_no_file_is_named_and_not_read",
        "test_files::test_only_a_file_is_a_lock", "test_toys::test_only_a_file_is_a_font"],
    "a text encoder's folder does not run its own code": [
        "test_encoders::test_a_folder_that_is_not_this_encoder_is_refused*3",
        "test_encoders::test_no_code_of_a_tokenizers_folder_is_run"],
    "the folder of another kind of encoder, or of none": [
        "test_encoders::test_a_folder_that_is_not_this_encoder_is_refused*3",
        "test_encoders::test_a_folder_without_an_encoder_is_refused*2"],
    "an encoder without some of its weights": [
        "test_encoders::test_a_folder_that_is_not_this_encoder_is_refused*4"],
    "an encoder without its own tokenizer": [
        "test_encoders::test_a_folder_that_is_not_this_encoder_is_refused*2",
        "test_encoders::test_another_models_tokenizer_is_refused*2"],
    "links in a run folder or at an output are not followed": [
        "test_files::test_no_link_is_followed", "test_sample::test_links_at_an_output_are_not_followed*4",
        "test_files::test_a_link_is_not_continued", "test_export::test_an_export_replaces_an_export"],
    "folders and pictures that may not be read": [
        "test_folder::test_folders_that_may_not_be_read_are_named",
        "test_folder::test_a_folder_that_may_be_listed_but_not_entered_is_named",
        "test_folder::test_words_that_may_not_be_read_are_named"],
    "a VAE of other settings lies in its place": [
        "test_settings::test_the_vae_that_is_there_already*11",
        "test_plan::test_a_vae_of_other_settings_is_never_taken_without_a_word*2",
        "test_plan::test_a_vae_that_cannot_be_taken_on"],
    "absurd sizes in training": [
        "test_plan::test_absurd_sizes_are_refused_with_an_estimate",
        "test_plan::test_sane_sizes_pass_on_a_small_machine"],
    "absurd sizes in sampling": [
        "test_sample::test_more_than_the_machine_has_is_refused", "test_sample::test_sample_refuses*6"],
    "names that are too long": [
        "test_cli::test_not_accepted*2", "test_sample::test_sample_refuses*2",
        "test_plan::test_folders_that_cannot_be_written_are_refused*2"],
    "folders that cannot be written": [
        "test_plan::test_folders_that_cannot_be_written_are_refused*7",
        "test_export::test_a_read_only_place_is_refused*2"],
    "vectors of differing widths": [
        "test_cache::test_vectors_of_differing_widths_name_the_file*2",
        "test_conditioning::test_vectors_of_differing_widths_are_refused_at_the_start*3"],
    "labels outside the classes": [
        "test_conditioning::test_labels_that_there_are_not", "test_sample::test_sample_refuses*3"],
    "a full disk": [
        "test_files::test_a_full_disk_keeps_the_old_file*4",
        "test_run::test_a_full_disk_keeps_the_old_checkpoint", "test_cache::test_no_space_for_a_cache",
        "test_sample::test_a_failed_write_keeps_the_old_picture"],
    "settings and checkpoints of another version that can go on": [
        "test_settings::test_a_flag_that_did_not_exist_takes_its_default",
        "test_run::test_settings_of_an_earlier_version*5",
        "test_run::test_a_checkpoint_without_text_is_read",
        "test_train::test_a_run_of_an_earlier_version_resumes"],
    "settings and checkpoints of another version that cannot": [
        "test_settings::test_settings_that_this_version_cannot_continue",
        "test_run::test_parts_that_a_checkpoint_lacks_are_named",
        "test_run::test_an_objective_of_another_version", "test_run::test_a_setting_of_another_version*2"],
    "streams that are closed, full or gone": [
        "test_cli::test_output_that_cannot_be_written_is_dropped", "test_cli::test_no_stream_at_all",
        "test_cli::test_programs_in_a_shell*2"],
    "long captions are shortened under pictures and in messages": [
        "test_pictures::test_long_captions_are_shortened*3",
        "test_conditioning::test_what_is_printed_is_short*5"],
    "labels of IDX and CIFAR files that fit no class or no picture": [
        "test_data::test_labels_and_pictures_of_mnist_belong_together", "test_data::test_bad_cifar10"],
    "damaged streams and headers of IDX and CIFAR files": [
        "test_data::test_damaged_idx", "test_data::test_a_damaged_stream"],
    "text vectors of no use": [
        "test_cache::test_vectors_that_are_no_use_are_refused_by_file_and_part",
        "test_cache::test_vectors_of_differing_widths_name_the_file*5"],
    "damaged fonts": [
        "test_toys::test_a_damaged_font_is_one_line_with_its_name",
        "test_toys::test_a_font_damaged_at_a_glyph", "test_pictures::test_damaged_fonts_are_passed_over*3"],
    "downloads that fail": [
        "test_data::test_why_a_download_failed_is_said",
        "test_data::test_a_failed_download_is_one_line_and_leaves_nothing"],
    "damaged JSON: metadata, stamps and records": [
        "test_folder::test_bad_metadata_is_one_line_with_its_name", "test_files::test_a_stamp_that_is_none",
        "test_files::test_a_damaged_record_is_none"],
    "damaged lines of metrics.jsonl": ["test_run::test_damaged_lines_of_metrics_never_stop_a_run*22"],
    "files that are no checkpoints": [
        "test_run::test_damaged_and_foreign_checkpoints*6", "test_run::test_files_that_are_no_checkpoints*5",
        "test_run::test_a_checkpoint_that_was_changed"],
    "exit statuses": [
        "test_cli::test_exit_statuses", "test_cli::test_faults_of_ours_are_not_hidden",
        "test_cli::test_bad_input_is_one_line_and_exit_status_2",
        "test_cli::test_a_program_passes_its_status_on"],

    # ---- what a newcomer missed
    "waits have a bar that moves": [
        "test_sample::test_the_bar_moves_with_every_step",
        "test_sample::test_a_share_is_told_after_each_step"],
    "--compile says that it compiles": [
        "test_surprises::test_training_says_that_it_compiles",
        "test_surprises::test_sampling_says_once_that_it_compiles"],
    "a clock that jumps": [
        "test_surprises::test_a_clock_that_jumps_changes_no_minutes",
        "test_train::test_a_jump_of_the_clock_is_not_in_the_minutes",
        "test_cli::test_a_clock_that_is_set_back_does_not_concern_bars"],
    "--strength changes as much as it says, also by default": [
        "test_sample::test_pictures_to_begin_with*8"],
    "the seam of an inpainted patch": ["test_sample::test_the_border_of_a_patch_is_blended*4"],
    "a run is lengthened": [
        "test_train::test_a_run_is_lengthened_before_its_rate_falls",
        "test_train::test_a_finished_run_is_lengthened",
        "test_train::test_what_more_steps_mean_for_the_rate"],
    "rate and batch change only where that is asked for": [
        "test_train::test_rate_and_batch_change_where_they_are_asked_for*2",
        "test_plan::test_a_finished_run_and_another_rate", "test_run::test_settings_of_an_earlier_version*2"],
    "the best and the latest checkpoints": [
        "test_train::test_keep_and_keep_best", "test_run::test_checkpoints_are_kept",
        "test_run::test_the_best_step*7",
        "test_run::test_the_best_step_where_best_is_asked_for_late*2"],
    "exported weights are read back": [
        "test_export::test_a_file_rebuilds_the_network_and_its_vae",
        "test_export::test_safetensors_holds_the_same"],
    "exported folders are read by diffusers": [
        "test_export::test_diffusers_draws_the_same", "test_export::test_a_vae_alone"],
    "exports that cannot be are refused": [
        "test_export::test_places_that_are_refused", "test_export::test_runs_that_are_refused",
        "test_export::test_what_diffusers_lacks_is_refused_by_name"],
    "many samples are continued after an interruption": [
        "test_sample::test_an_interrupted_output_is_continued*4",
        "test_sample::test_an_interruption_says_how_far_it_came",
        "test_files::test_a_damaged_record_is_none"],
    "prompts from a file": [
        "test_conditioning::test_prompts_from_a_file", "test_conditioning::test_what_is_no_file_of_prompts",
        "test_conditioning::test_prompts_from_a_pipe*2"],
    "previews of prompts of one's own": [
        "test_conditioning::test_previews_of_prompts_of_ones_own*4", "test_settings::test_refusals*2",
        "test_plan::test_settings_that_cannot_work*1"],
    "endings of a picture": ["test_sample::test_endings_of_a_picture"],
    "a VAE reconstructs the pictures that it is given": ["test_sample::test_a_vae_reconstructs*13"],
    "random crops": [
        "test_pictures::test_a_crop_may_lie_anywhere_on_the_longer_side",
        "test_folder::test_places_of_crops", "test_folder::test_several_crops_of_each_picture",
        "test_data::test_random_crops_of_a_folder"],
    "metadata.csv": ["test_folder::test_metadata_csv"],
    "time and memory are estimated at the start": [
        "test_train::test_what_is_left_is_said", "test_train::test_what_follows_is_said*2",
        "test_plan::test_memory_of_a_batch"],
    "captions in any script": [
        "test_pictures::test_captions_in_other_scripts*5",
        "test_pictures::test_fonts_of_a_user_without_a_home"],
    "SIGHUP": [
        "test_train::test_signals_finish_the_step_and_save*1", "test_cli::test_a_signal_is_one_line*1",
        "test_cli::test_nohup_keeps_its_meaning"],
    "weights that are not finite": [
        "test_run::test_weights_that_are_not_finite_are_never_used",
        "test_train::test_weights_that_are_not_finite_are_never_saved",
        "test_train::test_non_finite_loss_never_reaches_a_checkpoint"],
    "a flipped bit in a checkpoint": ["test_run::test_a_flipped_bit_of_a_checkpoint_is_noticed"],
    "empty values of flags": ["test_settings::test_refusals*12", "test_sample::test_sample_refuses*6"],
    "a slip in a command is one line": ["test_cli::test_a_slip_is_one_line"],
    "messages name the flag, what the run takes, and the remedy": [
        "test_conditioning::test_flags_that_a_run_does_not_take",
        "test_conditioning::test_guidance_that_a_run_cannot_have"],

    # ---- the suite and the benchmark under load
    "demonstrations run on one thread, within no limit of time": ["test_house::test_demonstrations"],
    "candidates of the benchmark take turns": [
        "test_benchmarks::test_candidates_take_turns*3",
        "test_benchmarks::test_networks_are_measured_in_turns_and_compiled_only_if_time_is_left"],
    "the spread of measurements is reported": [
        "test_benchmarks::test_spread_is_the_range_of_the_middle_half_over_the_median",
        "test_benchmarks::test_steady_load_is_noticed_although_it_causes_no_spread"],
    "a backward pass is timed by itself": [
        "test_benchmarks::test_backward_pass_is_timed_by_itself",
        "test_benchmarks::test_compiled_backward_pass_can_be_repeated"],
    "noisy measurements are repeated or marked": [
        "test_benchmarks::test_noisy_measurements_are_repeated", "test_benchmarks::test_rows_of_networks"],
    "no warm-up within a measurement": [
        "test_benchmarks::test_warm_up_ends_once_calls_no_longer_become_faster",
        "test_benchmarks::test_warm_up_is_not_in_the_measurement*2"],
    "the best matrix rate of the machine": [
        "test_benchmarks::test_matrix_rate_is_the_best_over_shapes_layouts_and_rounds"],
}


def cases(entry: str) -> int:
    """How many cases of its kind a test has. entry: "module::function" or "module::function*number"."""
    module, name, number = re.fullmatch(r"(test_\w+)::(test_\w+?)(?:\*([1-9]\d*))?", entry).groups()
    function = getattr(importlib.import_module(module), name)
    count = math.prod(len(list(mark.args[1])) for mark in getattr(function, "pytestmark", [])
                      if mark.name == "parametrize")
    if number is None:
        return count
    # A test with parameters has more cases than those only where its body has a loop.
    body = ast.parse(inspect.getsource(function)).body[0].body
    loops = any(isinstance(node, (ast.For, ast.comprehension)) for line in body for node in ast.walk(line))
    assert count == 1 or loops or int(number) <= count, f"{entry}: has {count} cases"
    return int(number)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_three_relatives(kind):
    counts = {entry: cases(entry) for entry in KINDS[kind]}
    assert sum(counts.values()) >= 3, counts


@pytest.mark.parametrize("entry, error", [
    ("test_folder::test_that_nobody_wrote", AttributeError), ("test_nowhere::test_a", ModuleNotFoundError),
    ("test_folder::test_metadata_csv*99", AssertionError)])
def test_a_row_that_promises_too_much_is_noticed(entry, error):
    with pytest.raises(error):
        cases(entry)


# ---- kinds that concern several rooms

@pytest.mark.parametrize("arch", ["vae", "dit", "mmdit", "unet"])
def test_training_says_that_it_compiles(monkeypatch, capsys, arch):
    compiled = []
    monkeypatch.setattr(train, "compile_blocks", lambda model, **more: compiled.append(model))
    args = SimpleNamespace(seed=0, arch=arch, weight_decay=0.0, lr=0.1, grad_checkpoint=False, compile=True,
                           ema=0.99, shard=False, expert_parallel=False, aspect=False)
    task = SimpleNamespace(build=lambda: torch.nn.Linear(2, 2))
    plan = SimpleNamespace(device=torch.device("cpu"), initial=None, ranks=ALONE)
    model = train.new_state(args, task, plan).model
    assert compiled == [model] and capsys.readouterr().out == (
        "--compile: the first step compiles the network, which can take minutes\n")
    args.compile = False
    train.new_state(args, task, plan)
    assert len(compiled) == 1 and capsys.readouterr().out == ""


def test_sampling_says_once_that_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    network = networks.graphed(lambda x: x + 1)
    assert [network(torch.zeros(1)).item() for _ in range(3)] == [1, 1, 1]
    assert capsys.readouterr().err == (
        "--compile: the next step compiles the network, which can take minutes\n")


@pytest.mark.parametrize("seconds", [-3600, 1e9, -1e9])
def test_a_clock_that_jumps_changes_no_minutes(cwd, monkeypatch, capsys, seconds):
    """Set back by an hour, or set far ahead or back, whenever it is asked."""
    times = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: seconds * next(times))
    assert train.main(DONE) == 0
    assert re.search(r" after 0\.\d minutes\n", capsys.readouterr().out)
