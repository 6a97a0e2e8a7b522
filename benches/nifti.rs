//! `.nii.gz` files of a CT and of labels, 200 x 512 x 512 voxels. The disk is part of it.

use criterion::Criterion;
use stunet::Device;
use stunet::io::{read_nifti, write_image, write_nifti};

use crate::common::{CT, Work, measure, phantom};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let folder = tempfile::tempdir().expect("a folder");
    let voxels = CT.iter().product::<usize>() as f64;
    let (ct, labels) = (folder.path().join("ct.nii.gz"), folder.path().join("labels.nii.gz"));
    measure(c, &device, "nifti", "write labels.nii.gz", Work::Bytes(voxels), || {
        device.install(|| write_nifti(&labels, &phantom().1)).expect("a file");
    });
    measure(c, &device, "nifti", "write ct.nii.gz", Work::Bytes(2.0 * voxels), || {
        device.install(|| write_image(&ct, &phantom().0)).expect("a file");
    });
    measure(c, &device, "nifti", "read ct.nii.gz", Work::Bytes(6.0 * voxels), || {
        if !ct.exists() {
            write_image(&ct, &phantom().0).expect("a file");
        }
        device.install(|| read_nifti(&[&ct])).expect("an image")
    });
    for path in [ct, labels] {
        if let Ok(meta) = path.metadata() {
            println!("{}: {} bytes", path.file_name().unwrap_or_default().display(), meta.len());
        }
    }
}
