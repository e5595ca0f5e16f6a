#!/bin/bash
# Makes the clips of this folder, with ffmpeg 5.1 (libx264, libx265, libvpx, SVT-AV1).
set -e
cd "$(dirname "$0")"
make() { ffmpeg -v error -y -f lavfi -i "testsrc2=size=${size:-96x64}:rate=25:duration=${seconds:-2.4}" "$@"; }
x264() { make -c:v libx264 -g 12 -bf 2 -pix_fmt yuv420p "$@"; }
x264 -x264-params open-gop=1:keyint=12:bframes=3:b-pyramid=normal open-gop.mp4
x264 -x264-params open-gop=1:keyint=12:bframes=3 open-gop.ts
x264 closed-gop.mkv
x264 -movflags frag_keyframe+empty_moov fragmented.mp4
x264 -f matroska -live 1 live.mkv
x264 -x264-params intra-refresh=1:keyint=12 intra-refresh.mp4
x264 -x264-params intra-refresh=1:keyint=12 intra-refresh.ts
x264 -vf "select='not(mod(n,7))+not(mod(n,3))'" -fps_mode vfr vfr.mp4
x264 -vf tinterlace=interleave_top -flags +ildct+ilme interlaced.mp4
x264 -pix_fmt yuv444p -profile:v high444 yuv444.mov
x264 b-frames.avi
x264 -bsf:v h264_mp4toannexb raw.h264
make -c:v libx265 -x265-params log-level=error:keyint=12:open-gop=1:bframes=3 -pix_fmt yuv420p10le hevc-open-gop.mp4
make -c:v libx265 -x265-params log-level=error:keyint=12:open-gop=1:bframes=3 hevc.ts
make -c:v libvpx-vp9 -g 12 -auto-alt-ref 1 -lag-in-frames 10 -b:v 100k vp9.webm
make -c:v libsvtav1 -g 12 -preset 8 -svtav1-params log=0 av1.mkv 2>/dev/null
make -c:v mpeg2video -g 12 -bf 2 -q:v 8 mpeg2.mpg
make -c:v mpeg2video -g 12 -bf 2 -q:v 8 mpeg2.ts
size=97x65 make -c:v mpeg4 -g 12 -bf 2 -q:v 8 mpeg4.avi
x264 whole.mp4
ffmpeg -v error -y -ss 1.3 -i whole.mp4 -c copy edit-list.mp4
ffmpeg -v error -y -i whole.mp4 -c copy -metadata:s:v rotate=90 rotated.mp4
ffmpeg -v error -y -i whole.mp4 -f lavfi -i sine=duration=1 -c:v copy -c:a aac -shortest -t 1 sound.mp4
ffmpeg -v error -y -f lavfi -i sine=duration=1 -c:a aac only-sound.m4v
ffmpeg -v error -y -i only-sound.m4v -f lavfi -i color=red:size=32x32 -map 0:a -map 1:v -t 0.04 -c:a copy -c:v mjpeg -disposition:v attached_pic cover.mp4
x264 -movflags faststart faststart.mp4
cat open-gop.ts open-gop.ts > discontinuity.ts
size=64x48 seconds=1 x264 small.h264 && cat raw.h264 small.h264 > size-changes.h264 && rm small.h264
